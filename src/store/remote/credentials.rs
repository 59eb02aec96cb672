//! Whether there are credentials: otherwise the client would wait for the metadata service of a cloud, at an address
//! that does not answer anywhere else.

use std::path::Path;

use super::settings::Settings;
use crate::error::{Error, Result};
use crate::location::Scheme;

/// The directory in which Linux shows who made this machine.
const FIRMWARE: &str = "/sys/class/dmi/id";

/// The tag that Azure gives the chassis of all its machines.
const AZURE_CHASSIS: &str = "7783-7084-3265-9085-8269-3286-77";

/// The variables, options and files that are looked at, for errors.
pub(super) fn looked_at(scheme: Scheme) -> &'static str {
    match scheme {
        Scheme::S3 => {
            "AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, AWS_WEB_IDENTITY_TOKEN_FILE with \
             AWS_ROLE_ARN, AWS_CONTAINER_CREDENTIALS_RELATIVE_URI, AWS_CONTAINER_CREDENTIALS_FULL_URI with \
             AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE, and on EC2 the role of the instance; not at AWS_PROFILE, ~/.aws \
             and SSO: for these, run `eval \"$(aws configure export-credentials --format env)\"`"
        }
        Scheme::Gs => {
            "GOOGLE_APPLICATION_CREDENTIALS, GOOGLE_SERVICE_ACCOUNT, GOOGLE_SERVICE_ACCOUNT_KEY, the file of `gcloud \
             auth application-default login`, and on Google Cloud the account of the instance"
        }
        Scheme::Az => {
            "AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN, AZURE_CLIENT_ID with AZURE_CLIENT_SECRET and \
             AZURE_TENANT_ID or with AZURE_FEDERATED_TOKEN_FILE, IDENTITY_ENDPOINT, AZURE_USE_AZURE_CLI, and on Azure \
             the identity of the instance"
        }
        Scheme::Memory => "nothing",
    }
}

/// Refuses settings without credentials, unless this machine is one whose cloud provides them.
///
/// # Errors
///
/// `Io` with `EACCES`, which names every place that was searched.
pub(super) fn check(settings: &Settings) -> Result<()> {
    if are_given(settings) || (!is_metadata_disabled() && is_in_cloud(settings.scheme, Path::new(FIRMWARE))) {
        return Ok(());
    }
    let text = format!(
        "there are no credentials for the bucket {}; looked at the storage options, {}",
        settings.bucket,
        looked_at(settings.scheme)
    );
    Err(Error::io(text, rustix::io::Errno::ACCESS))
}

fn are_given(settings: &Settings) -> bool {
    let has = |names: &[&str]| names.iter().all(|name| settings.has(name));
    match settings.scheme {
        // An explicit address of the metadata service is one that answers.
        Scheme::S3 => {
            settings.is_set("aws_skip_signature")
                || has(&["aws_access_key_id", "aws_secret_access_key"])
                || has(&["aws_web_identity_token_file", "aws_role_arn"])
                || has(&["aws_container_credentials_relative_uri"])
                || has(&["aws_container_credentials_full_uri", "aws_container_authorization_token_file"])
                || has(&["aws_metadata_endpoint"])
        }
        Scheme::Gs => {
            settings.is_set("google_skip_signature")
                || has(&["google_service_account"])
                || has(&["google_service_account_key"])
                || has(&["google_application_credentials"])
                || has(&["google_bearer_token"])
                || has_gcloud_file()
        }
        Scheme::Az => {
            settings.is_set("azure_skip_signature")
                || settings.is_set("azure_storage_use_emulator")
                || settings.is_set("azure_use_azure_cli")
                || has(&["azure_storage_account_key"])
                || has(&["azure_storage_sas_key"])
                || has(&["azure_storage_token"])
                || has(&["azure_storage_client_id", "azure_storage_client_secret", "azure_storage_tenant_id"])
                || has(&["azure_federated_token_file"])
                || has(&["azure_msi_endpoint"])
        }
        Scheme::Memory => true,
    }
}

/// Whether there is the file of the command line of Google Cloud, which the client reads.
fn has_gcloud_file() -> bool {
    let file = Path::new(".config/gcloud/application_default_credentials.json");
    std::env::var_os("HOME").is_some_and(|home| Path::new(&home).join(file).is_file())
}

fn is_metadata_disabled() -> bool {
    std::env::var_os("AWS_EC2_METADATA_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"))
}

/// Whether the firmware says that this machine is in the cloud of the store.
fn is_in_cloud(scheme: Scheme, firmware: &Path) -> bool {
    let says = |name: &str, text: &str| {
        let said = std::fs::read(firmware.join(name)).unwrap_or_default();
        String::from_utf8_lossy(&said).contains(text)
    };
    match scheme {
        Scheme::S3 => {
            says("sys_vendor", "Amazon EC2") || says("bios_vendor", "Amazon EC2") || says("bios_version", "amazon")
        }
        Scheme::Gs => says("product_name", "Google Compute Engine") || std::env::var_os("K_SERVICE").is_some(),
        Scheme::Az => says("chassis_asset_tag", AZURE_CHASSIS),
        Scheme::Memory => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::settings::tests::settings;
    use super::*;

    #[test]
    fn without_credentials_the_error_names_all_that_was_looked_at() {
        for (url, variables) in [
            ("s3://b/v", &[("AWS_PROFILE", "p"), ("AWS_ACCESS_KEY_ID", "half"), ("AWS_REGION", "eu-west-1")][..]),
            ("az://b/v", &[("AZURE_STORAGE_ACCOUNT_NAME", "a")]),
        ] {
            let settings = settings(url, &[], variables).unwrap();
            assert!(!are_given(&settings), "{url}");
        }
        let settings = settings("s3://b/v", &[], &[]).unwrap();
        if is_in_cloud(Scheme::S3, Path::new(FIRMWARE)) {
            return;
        }
        let error = check(&settings).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EACCES));
        assert!(error.to_string().contains("AWS_ACCESS_KEY_ID") && error.to_string().contains("export-credentials"));
    }

    #[test]
    fn each_kind_of_credentials_is_enough() {
        for (url, variables) in [
            ("s3://b/v", &[("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")][..]),
            ("s3://b/v", &[("AWS_WEB_IDENTITY_TOKEN_FILE", "/f"), ("AWS_ROLE_ARN", "r")]),
            ("s3://b/v", &[("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/x")]),
            ("s3://b/v", &[("AWS_SKIP_SIGNATURE", "true")]),
            ("gs://b/v", &[("GOOGLE_APPLICATION_CREDENTIALS", "/f")]),
            ("az://b/v", &[("AZURE_STORAGE_SAS_TOKEN", "s")]),
            ("az://b/v", &[("AZURE_CLIENT_ID", "c"), ("AZURE_CLIENT_SECRET", "s"), ("AZURE_TENANT_ID", "t")]),
            ("memory://b/v", &[]),
        ] {
            check(&settings(url, &[], variables).unwrap()).unwrap();
        }
    }

    #[test]
    fn a_cloud_is_known_by_its_firmware() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text, scheme) in [
            ("sys_vendor", "Amazon EC2\n", Scheme::S3),
            ("product_name", "Google Compute Engine\n", Scheme::Gs),
            ("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77\n", Scheme::Az),
        ] {
            assert!(!is_in_cloud(scheme, folder.path()));
            std::fs::write(folder.path().join(name), text).unwrap();
            assert!(is_in_cloud(scheme, folder.path()));
        }
    }
}
