//! Options and the environment, checked: everything that a connection depends on.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::str::FromStr;

use object_store::aws::AmazonS3ConfigKey;
use object_store::azure::AzureConfigKey;
use object_store::gcp::GoogleConfigKey;

use crate::error::{Error, Result};
use crate::location::{Scheme, StoreUrl};
use crate::store::RemoteOptions;

/// The settings of a bucket. Equal settings share a connection.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Settings {
    pub(super) scheme: Scheme,
    pub(super) bucket: String,
    /// The values by the names that `object_store` gives them, from the options and the environment.
    pub(super) values: BTreeMap<String, String>,
    /// Whether the client may send requests without TLS.
    pub(super) allow_http: bool,
}

/// The names that one kind of store has for the things that are checked here.
struct Names {
    /// The beginning of its variables and of the names of its own options; others are about HTTP.
    prefix: &'static str,
    /// The bucket, which the URL names.
    bucket: &'static str,
    endpoints: &'static [&'static str],
    /// If an option is one of these, the environment has no say in any.
    credentials: &'static [&'static str],
}

const S3: Names = Names {
    prefix: "aws_",
    bucket: "aws_bucket",
    endpoints: &["aws_endpoint", "aws_endpoint_url_s3"],
    credentials: &[
        "aws_access_key_id",
        "aws_secret_access_key",
        "aws_session_token",
        "aws_web_identity_token_file",
        "aws_role_arn",
        "aws_container_credentials_relative_uri",
        "aws_container_credentials_full_uri",
        "aws_container_authorization_token_file",
        "aws_skip_signature",
    ],
};

const GS: Names = Names {
    prefix: "google_",
    bucket: "google_bucket",
    endpoints: &["google_base_url"],
    credentials: &[
        "google_service_account",
        "google_service_account_key",
        "google_application_credentials",
        "google_bearer_token",
        "google_skip_signature",
    ],
};

const AZ: Names = Names {
    prefix: "azure_",
    bucket: "azure_container_name",
    endpoints: &["azure_storage_endpoint"],
    credentials: &[
        "azure_storage_account_key",
        "azure_storage_client_id",
        "azure_storage_client_secret",
        "azure_storage_sas_key",
        "azure_storage_token",
        "azure_federated_token_file",
        "azure_msi_endpoint",
        "azure_use_azure_cli",
        "azure_skip_signature",
    ],
};

const ALLOW_HTTP: &str = "allow_http";

impl Settings {
    /// The settings of the bucket of `url`, from `options` and, for all that they leave open, from the environment.
    pub(super) fn new(url: &StoreUrl, options: &RemoteOptions) -> Result<Self> {
        let variables = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
        let variables = variables.filter_map(|(name, value)| Some((name, value.into_string().ok()?)));
        Self::resolve(url, options, variables)
    }

    fn resolve(
        url: &StoreUrl,
        options: &RemoteOptions,
        variables: impl Iterator<Item = (String, String)>,
    ) -> Result<Self> {
        let mut settings = Self {
            scheme: url.scheme(),
            bucket: url.bucket().to_owned(),
            values: BTreeMap::new(),
            allow_http: options.allow_http,
        };
        match url.scheme() {
            Scheme::S3 => settings.fill::<AmazonS3ConfigKey>(&S3, options, variables)?,
            Scheme::Gs => settings.fill::<GoogleConfigKey>(&GS, options, variables)?,
            Scheme::Az => settings.fill::<AzureConfigKey>(&AZ, options, variables)?,
            Scheme::Memory => {
                if let Some(name) = options.storage_options.keys().next() {
                    return Err(unknown(url.scheme(), name));
                }
            }
        }
        Ok(settings)
    }

    fn fill<K: FromStr + AsRef<str>>(
        &mut self,
        names: &Names,
        options: &RemoteOptions,
        variables: impl Iterator<Item = (String, String)>,
    ) -> Result<()> {
        let canonical = |name: &str| name.parse::<K>().ok().map(|key| key.as_ref().to_owned());
        for (name, value) in &options.storage_options {
            let key = canonical(&name.to_ascii_lowercase()).ok_or_else(|| unknown(self.scheme, name))?;
            if key == names.bucket {
                let text = format!("the storage option {name:?} cannot be used: the URL names the bucket");
                return Err(Error::invalid_argument(text));
            }
            if let Some(other) = self.values.insert(key, value.clone())
                && other != *value
            {
                let text = format!("the storage option {name:?} is given twice, under two of its names");
                return Err(Error::invalid_argument(text));
            }
        }
        let given = |group: &[&str]| group.iter().any(|name| self.values.contains_key(*name));
        let (has_endpoint, has_credentials) = (given(names.endpoints), given(names.credentials));
        for (variable, value) in variables {
            // Of the names that also mean something without a prefix, such as `timeout`, only options count.
            let name = variable.to_ascii_lowercase();
            let is_ours = name.starts_with(names.prefix) || matches!(&*variable, "IDENTITY_ENDPOINT");
            let Some(key) = is_ours.then(|| canonical(&name)).flatten() else { continue };
            let is_overridden = key == names.bucket
                || !key.starts_with(names.prefix)
                || (has_endpoint && names.endpoints.contains(&&*key))
                || (has_credentials && names.credentials.contains(&&*key));
            if !is_overridden && !value.is_empty() {
                self.values.entry(key).or_insert(value);
            }
        }
        if let Some(value) = self.values.remove(ALLOW_HTTP) {
            self.allow_http |= value.eq_ignore_ascii_case("true");
        }
        self.check_endpoints(names)
    }

    /// Refuses a server to which everybody on the way could listen.
    fn check_endpoints(&mut self, names: &Names) -> Result<()> {
        let mut is_local = false;
        for name in names.endpoints {
            let Some(endpoint) = self.values.get(*name) else { continue };
            let Some((scheme, rest)) = endpoint.split_once("://") else {
                let text = format!("the endpoint of the store ({name}) must begin with https:// or http://");
                return Err(Error::invalid_argument(text));
            };
            let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
            if authority.contains('@') {
                let text = format!("the endpoint of the store ({name}) contains user information; pass it as options");
                return Err(Error::invalid_argument(text));
            }
            if scheme.eq_ignore_ascii_case("https") {
                continue;
            }
            is_local = is_loopback(authority);
            if !is_local && !self.allow_http {
                return Err(Error::invalid_argument(format!(
                    "the endpoint {scheme}://{authority} has no TLS: anybody on the way could read the requests and \
                     change the answers; use https://, or allow it by --allow-http or allow_http"
                )));
            }
        }
        self.allow_http |= is_local;
        Ok(())
    }

    /// Whether an option has the value "true".
    pub(super) fn is_set(&self, name: &str) -> bool {
        self.values.get(name).is_some_and(|value| value.eq_ignore_ascii_case("true") || value == "1")
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    /// The region of requests to S3.
    pub(super) fn region(&self) -> &str {
        let value = |name| self.values.get(name).map(String::as_str);
        value("aws_region").or(value("aws_default_region")).unwrap_or("us-east-1")
    }
}

fn is_loopback(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn unknown(scheme: Scheme, name: &str) -> Error {
    let example = match scheme {
        Scheme::S3 => "; there are, for example, 'region', 'endpoint', 'access_key_id' and 'secret_access_key'",
        Scheme::Gs => "; there are, for example, 'service_account' and 'base_url'",
        Scheme::Az => "; there are, for example, 'account_name', 'account_key', 'sas_token' and 'endpoint'",
        Scheme::Memory => "; a memory:// URL takes no options",
    };
    Error::invalid_argument(format!("{} is not a storage option of this store{example}", crate::name::shown(name)))
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;

    use super::*;
    use crate::location::Location;

    pub(in crate::store::remote) fn url(text: &str) -> StoreUrl {
        match Location::new(Path::new(text)).unwrap() {
            Location::Url(url) => url,
            Location::Path(_) => panic!("{text} is a path"),
        }
    }

    pub(in crate::store::remote) fn settings(
        text: &str,
        options: &[(&str, &str)],
        variables: &[(&str, &str)],
    ) -> Result<Settings> {
        let pairs = |pairs: &[(&str, &str)]| -> Vec<_> {
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        let options =
            RemoteOptions { storage_options: pairs(options).into_iter().collect(), ..RemoteOptions::default() };
        Settings::resolve(&url(text), &options, pairs(variables).into_iter())
    }

    #[test]
    fn the_names_are_those_of_the_client() {
        for (names, canonical) in [
            (&S3, (|name| name.parse::<AmazonS3ConfigKey>().unwrap().as_ref().to_owned()) as fn(&str) -> String),
            (&GS, |name| name.parse::<GoogleConfigKey>().unwrap().as_ref().to_owned()),
            (&AZ, |name| name.parse::<AzureConfigKey>().unwrap().as_ref().to_owned()),
        ] {
            assert_eq!(canonical(names.bucket), names.bucket);
            for name in names.endpoints.iter().chain(names.credentials) {
                assert_eq!(canonical(name), *name);
            }
        }
    }

    #[test]
    fn an_option_overrides_the_variables_of_its_group() {
        let variables = [
            ("AWS_REGION", "eu-west-1"),
            ("AWS_ACCESS_KEY_ID", "of the environment"),
            ("AWS_SESSION_TOKEN", "of the environment"),
            ("AWS_ENDPOINT_URL_S3", "https://of.the.environment"),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_TIMEOUT", "1s"),
            ("AWS_BUCKET", "another"),
        ];
        let options = [("access_key_id", "given"), ("SECRET_ACCESS_KEY", "given"), ("endpoint", "https://given")];
        let found = settings("s3://bucket/vm1", &options, &variables).unwrap();
        let expected = [
            ("aws_access_key_id", "given"),
            ("aws_endpoint", "https://given"),
            ("aws_region", "eu-west-1"),
            ("aws_secret_access_key", "given"),
        ];
        assert!(found.values.iter().map(|(name, value)| (&**name, &**value)).eq(expected), "{:?}", found.values);
        assert!(!found.allow_http);
        assert_eq!(found.region(), "eu-west-1");
    }

    #[test]
    fn an_unknown_option_is_refused() {
        for (text, name) in [("s3://b/v", "reigon"), ("gs://b/v", "aws_region"), ("memory://b/v", "region")] {
            let error = settings(text, &[(name, "a value")], &[]).err().unwrap();
            assert!(error.is_invalid_argument() && error.to_string().contains(name), "{error}");
            assert!(!error.to_string().contains("a value"));
        }
        assert!(settings("s3://b/v", &[("bucket", "other")], &[]).is_err());
        assert!(settings("s3://b/v", &[("region", "a"), ("aws_region", "b")], &[]).is_err());
    }

    #[test]
    fn only_a_loopback_address_needs_no_tls() {
        for endpoint in ["http://127.0.0.1:9000", "http://[::1]:9000/x", "HTTP://localhost", "https://anywhere"] {
            let found = settings("s3://b/v", &[("endpoint", endpoint)], &[]).unwrap();
            assert_eq!(found.allow_http, !endpoint.starts_with("https"), "{endpoint}");
        }
        for endpoint in ["http://10.0.0.1", "http://localhost.example", "http://127.0.0.1.example", "http://u@[::1]"] {
            for (url, name) in [("s3://b/v", "endpoint"), ("gs://b/v", "base_url"), ("az://b/v", "endpoint")] {
                assert!(settings(url, &[(name, endpoint)], &[]).err().unwrap().is_invalid_argument(), "{endpoint}");
            }
        }
        assert!(settings("s3://b/v", &[("endpoint", "127.0.0.1:9000")], &[]).is_err());
        assert!(settings("s3://b/v", &[("endpoint", "http://10.0.0.1"), ("allow_http", "true")], &[]).is_ok());
        assert!(settings("s3://b/v", &[("endpoint", "http://10.0.0.1")], &[("AWS_ALLOW_HTTP", "true")]).is_err());
    }
}
