//! A data key wrapped by [age](https://c2sp.org/age), for recipients or with a passphrase. Only this module uses the
//! crate.

use std::collections::BTreeMap;
use std::io::{BufReader, Read, Write};

use age::secrecy::{ExposeSecret, SecretString};
use age::ssh::{ParseRecipientKeyError, UnsupportedKey};
use age::{DecryptError, Decryptor, EncryptError, Encryptor, IdentityFile, NoCallbacks, plugin, scrypt, ssh, x25519};
use zeroize::Zeroizing;

use super::background::in_background;
use super::identity::{Identity, is_encrypted, plain_text};
use super::recipients_file::{IS_IDENTITY, IS_MALFORMED, NoRecipient};
use super::secret_text::SecretText;
use crate::buffer;
use crate::error::{Error, Kind, Result};

/// The work factor of scrypt, as a power of two. It is the same as in the `age` command: about a second and 256 MiB.
const WORK_FACTOR: u8 = 18;
/// The largest work factor for reading, the same as in the `age` command: about ten seconds and 4 GiB.
const MAX_WORK_FACTOR: u8 = 22;

/// The memory that scrypt uses for each unit of its cost N: 128 r, and r = 8 in age (RFC 7914, section 5).
const SCRYPT_BLOCK_BYTES: usize = 1024;

/// The largest payload; a usual one has about 130 bytes.
const MAX_PAYLOAD_BYTES: u64 = 64 << 10;

type Recipients = Vec<Box<dyn age::Recipient + Send>>;
type Identities = Vec<Box<dyn age::Identity + Send + Sync>>;

/// The parsed recipients of a snapshot.
pub(super) struct Parsed(Recipients);

/// Checks that this build supports age; it does.
#[expect(clippy::unnecessary_wraps, reason = "a build without the feature does not")]
pub(super) fn check_present() -> Result<()> {
    Ok(())
}

/// A new identity, and its recipient.
#[expect(clippy::unnecessary_wraps, reason = "a build without the feature returns an error")]
pub(super) fn generate() -> Result<(SecretText, String)> {
    let identity = x25519::Identity::generate();
    Ok((Zeroizing::new(identity.to_string().expose_secret().to_owned()), identity.to_public().to_string()))
}

/// The contents of an identity file in the format of `age-keygen`.
pub(super) fn identity_file(identity: &str, recipient: &str) -> String {
    let created = humantime::format_rfc3339_seconds(std::time::SystemTime::now());
    format!("# created: {created}\n# public key: {recipient}\n{identity}\n")
}

/// One recipient, parsed.
enum OneRecipient {
    Own(Box<dyn age::Recipient + Send>),
    OfPlugin(plugin::Recipient),
}

/// Parses the recipients that the caller passed.
pub(super) fn parse_recipients(texts: &[String]) -> Result<Parsed> {
    let mut recipients: Recipients = Vec::new();
    let mut plugins: BTreeMap<String, Vec<plugin::Recipient>> = BTreeMap::new();
    for text in texts {
        match parse_recipient(text.trim()) {
            Ok(OneRecipient::Own(recipient)) => recipients.push(recipient),
            Ok(OneRecipient::OfPlugin(recipient)) => {
                plugins.entry(recipient.plugin().to_owned()).or_default().push(recipient);
            }
            // An identity is a secret, so the error does not quote it.
            Err(NoRecipient::Identity) => {
                return Err(Error::invalid_argument(format!("the given recipient {IS_IDENTITY}")));
            }
            Err(NoRecipient::Malformed) => {
                return Err(Error::invalid_argument(format!("{text:?} {IS_MALFORMED}")));
            }
            Err(NoRecipient::Unusable(why)) => {
                return Err(Error::invalid_argument(format!("{text:?} cannot be used as a recipient: {why}")));
            }
        }
    }
    for (name, of_plugin) in plugins {
        let plugin =
            plugin::RecipientPluginV1::new(&name, &of_plugin, &[], NoCallbacks).map_err(|error| no_plugin(&error))?;
        recipients.push(Box::new(plugin));
    }
    if recipients.is_empty() {
        return Err(Error::invalid_argument("the list of recipients is empty, so nobody could open the snapshot"));
    }
    Ok(Parsed(recipients))
}

/// Checks that a text is a usable recipient.
pub(super) fn check_recipient(text: &str) -> std::result::Result<(), NoRecipient> {
    parse_recipient(text).map(|_| ())
}

fn parse_recipient(text: &str) -> std::result::Result<OneRecipient, NoRecipient> {
    if let Ok(recipient) = text.parse::<x25519::Recipient>() {
        return Ok(OneRecipient::Own(Box::new(recipient)));
    }
    if let Ok(recipient) = text.parse::<age::tag::Recipient>() {
        return Ok(OneRecipient::Own(Box::new(recipient)));
    }
    if let Ok(recipient) = text.parse::<age::tagpq::Recipient>() {
        return Ok(OneRecipient::Own(Box::new(recipient)));
    }
    if let Ok(recipient) = text.parse::<plugin::Recipient>() {
        return Ok(OneRecipient::OfPlugin(recipient));
    }
    if text.starts_with("AGE-SECRET-KEY-") || text.starts_with("AGE-PLUGIN-") {
        return Err(NoRecipient::Identity);
    }
    match text.parse::<ssh::Recipient>() {
        Ok(recipient) => Ok(OneRecipient::Own(Box::new(recipient))),
        Err(ParseRecipientKeyError::RsaModulusTooSmall) => {
            Err(NoRecipient::Unusable("age supports only RSA keys of at least 2048 bits".to_owned()))
        }
        Err(ParseRecipientKeyError::RsaModulusTooLarge) => {
            Err(NoRecipient::Unusable("age supports only RSA keys of at most 4096 bits".to_owned()))
        }
        Err(ParseRecipientKeyError::Unsupported(kind)) => Err(NoRecipient::Unusable(format!(
            "age supports SSH keys of the types ssh-ed25519 and ssh-rsa, not {kind}"
        ))),
        Err(_) => Err(NoRecipient::Malformed),
    }
}

/// The recipients of identities.
pub(super) fn recipients_of(content: &[u8], place: &str) -> Result<Parsed> {
    let context = |error: Error| error.context(place);
    let recipients = if is_ssh(content) {
        let identity = parse_ssh(content).map_err(context)?;
        let recipient = ssh::Recipient::try_from(identity)
            .map_err(|_| context(Error::invalid_argument("it is an SSH key of a type that age does not support")))?;
        vec![Box::new(recipient) as _]
    } else {
        parse_identity_file(content).map_err(context)?.to_recipients().map_err(|error| context(not_wrapped(&error)))?
    };
    if recipients.is_empty() {
        return Err(context(Error::invalid_argument("it contains no identity")));
    }
    Ok(Parsed(recipients))
}

/// The recipients of identities as texts. Identities of plugins are refused.
pub(super) fn public_halves(identity: &Identity, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<Vec<String>> {
    let content = decrypted(identity, interrupt)?;
    let context = |error: Error| error.context(identity.place());
    if is_ssh(&content) {
        let key = parse_ssh(&content).map_err(context)?;
        let recipient = ssh::Recipient::try_from(key)
            .map_err(|_| context(Error::invalid_argument("it is an SSH key of a type that age does not support")))?;
        return Ok(vec![recipient.to_string()]);
    }
    let mut lines = Zeroizing::new(Vec::new());
    parse_identity_file(&content).map_err(context)?.write_recipients_file(&mut *lines).map_err(|error| {
        use age::IdentityFileConvertError::{IdentityFileContainsPlugin, NoIdentities};
        context(Error::invalid_argument(match error {
            NoIdentities { .. } => "it contains no identity".to_owned(),
            IdentityFileContainsPlugin { plugin_name, .. } => {
                format!("it contains an identity of a plugin; age-plugin-{plugin_name} prints its recipient")
            }
            _ => "its recipients cannot be determined".to_owned(),
        }))
    })?;
    Ok(String::from_utf8_lossy(&lines).lines().map(str::to_owned).collect())
}

pub(super) fn wrap(payload: &[u8], recipients: Parsed, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<Vec<u8>> {
    let payload = Zeroizing::new(payload.to_vec());
    finished(in_background(None, interrupt, move || {
        let recipients = recipients.0.iter().map(|recipient| &**recipient as &dyn age::Recipient);
        encrypt(Encryptor::with_recipients(recipients), &payload)
    })?)
}

pub(super) fn wrap_with_passphrase(
    payload: &[u8],
    passphrase: &SecretText,
    interrupt: &mut dyn FnMut() -> Result<()>,
) -> Result<Vec<u8>> {
    let payload = Zeroizing::new(payload.to_vec());
    let mut recipient = scrypt::Recipient::new(SecretString::from(passphrase.as_str()));
    recipient.set_work_factor(WORK_FACTOR);
    finished(in_background(None, interrupt, move || {
        probe_scrypt(WORK_FACTOR)?;
        encrypt(Encryptor::with_recipients(std::iter::once(&recipient as &dyn age::Recipient)), &payload)
    })?)
}

fn encrypt(encryptor: std::result::Result<Encryptor, EncryptError>, payload: &[u8]) -> Result<Vec<u8>> {
    let mut file = Vec::new();
    let mut writer = encryptor.map_err(|error| not_wrapped(&error))?.wrap_output(&mut file)?;
    writer.write_all(payload)?;
    writer.finish()?;
    wipe_freed();
    Ok(file)
}

/// Overwrites memory that the crate has just freed: it keeps the plaintext in a buffer of 64 KiB and does not wipe it.
/// The next allocation of this size by the same thread usually gets the same memory; the allocator does not promise
/// that.
fn wipe_freed() {
    const CHUNK_BYTES: usize = 64 << 10;
    std::hint::black_box(vec![0xff_u8; CHUNK_BYTES]);
}

/// Decrypts with the first identity that fits.
pub(super) fn unwrap(
    file: &[u8],
    identities: Identities,
    interrupt: &mut dyn FnMut() -> Result<()>,
) -> Result<Zeroizing<Vec<u8>>> {
    let decryptor = read_header(file)?;
    if decryptor.is_scrypt() {
        return Err(Error::new(
            Kind::KeyUnavailable,
            "its key is wrapped with a passphrase; pass the passphrase, not identities",
        ));
    }
    let file = file.to_vec();
    finished(in_background(None, interrupt, move || {
        decrypt(&file, &mut identities.iter().map(|identity| &**identity as &dyn age::Identity))
    })?)
}

pub(super) fn unwrap_with_passphrase(
    file: &[u8],
    passphrase: impl FnOnce() -> Result<std::sync::Arc<SecretText>>,
    interrupt: &mut dyn FnMut() -> Result<()>,
) -> Result<Zeroizing<Vec<u8>>> {
    let decryptor = read_header(file)?;
    if !decryptor.is_scrypt() {
        return Err(Error::new(
            Kind::KeyUnavailable,
            "its key is wrapped for age recipients; pass identities, not a passphrase",
        ));
    }
    // Ask for the passphrase only now, when it is needed.
    let mut identity = scrypt::Identity::new(SecretString::from(passphrase()?.as_str()));
    identity.set_max_work_factor(MAX_WORK_FACTOR);
    let file = file.to_vec();
    finished(in_background(None, interrupt, move || decrypt_by_scrypt(&file, &identity))?)
}

/// Checks that there is enough memory for scrypt, because the crate would abort without it.
fn probe_scrypt(work_factor: u8) -> Result<()> {
    buffer::probe(SCRYPT_BLOCK_BYTES << work_factor)
}

/// Decrypts with a passphrase.
fn decrypt_by_scrypt(file: &[u8], key: &scrypt::Identity) -> Result<Zeroizing<Vec<u8>>> {
    let shown = stanzas(file)?;
    let work_factor = shown.iter().find_map(|stanza| stanza.strip_prefix("scrypt ")?.parse::<u8>().ok());
    if let Some(work_factor) = work_factor.filter(|work_factor| *work_factor <= MAX_WORK_FACTOR) {
        probe_scrypt(work_factor)?;
    }
    decrypt(file, &mut std::iter::once(key as &dyn age::Identity))
}

fn decrypt(file: &[u8], identities: &mut dyn Iterator<Item = &dyn age::Identity>) -> Result<Zeroizing<Vec<u8>>> {
    let reader = read_header(file)?.decrypt(identities).map_err(|error| not_opened(&error))?;
    // Large enough: a vector that grows leaves copies behind.
    let mut payload = Zeroizing::new(Vec::with_capacity(file.len()));
    reader
        .take(MAX_PAYLOAD_BYTES)
        .read_to_end(&mut payload)
        .map_err(|_| not_opened(&DecryptError::DecryptionFailed))?;
    Ok(payload)
}

/// The result of work without a time limit.
fn finished<T>(result: Option<Result<T>>) -> Result<T> {
    result.unwrap_or_else(|| Err(Error::new(Kind::Provider, "wrapping or unwrapping the key took too long")))
}

/// The recipients of a file, as far as its header shows them: `X25519`, `ssh-ed25519 …`, `scrypt 18`.
pub(super) fn stanzas(file: &[u8]) -> Result<Vec<String>> {
    /// An identity that opens nothing and records all stanzas.
    struct Onlooker(std::cell::RefCell<Vec<String>>);

    impl age::Identity for Onlooker {
        fn unwrap_stanza(
            &self,
            stanza: &age_core::format::Stanza,
        ) -> Option<std::result::Result<age_core::format::FileKey, DecryptError>> {
            let shown = match (stanza.tag.as_str(), stanza.args.as_slice()) {
                // The hash of the public key, and the work factor after the salt.
                (kind @ ("ssh-ed25519" | "ssh-rsa"), [hash, ..]) => format!("{kind} {hash}"),
                (kind @ "scrypt", [_, work_factor]) => format!("{kind} {work_factor}"),
                (kind, _) => kind.to_owned(),
            };
            self.0.borrow_mut().push(shown);
            None
        }
    }

    let onlooker = Onlooker(std::cell::RefCell::default());
    let decryptor = read_header(file)?;
    // This fails, because no identity opens the file.
    let _ = decryptor.decrypt(std::iter::once(&onlooker as &dyn age::Identity));
    let mut stanzas = onlooker.0.into_inner();
    // Random stanzas that age adds ("grease").
    stanzas.retain(|stanza| !stanza.ends_with("-grease"));
    Ok(stanzas)
}

/// Reads and parses the identities that the caller passed.
pub(super) fn load(identities: &[Identity], interrupt: &mut dyn FnMut() -> Result<()>) -> Result<Identities> {
    let mut parsed = Vec::new();
    for identity in identities {
        parse_identities(&decrypted(identity, interrupt)?, identity, &mut parsed)
            .map_err(|error| error.context(identity.place()))?;
    }
    if parsed.is_empty() {
        return Err(Error::invalid_argument("the list of identities is empty, so nothing can open the snapshot"));
    }
    Ok(parsed)
}

/// Parses the default identity.
pub(super) fn parse_default(content: &[u8], place: &str) -> Result<Identities> {
    let mut parsed = Vec::new();
    let text = Identity::text(Zeroizing::new(String::new()));
    parse_identities(content, &text, &mut parsed).map_err(|error| error.context(place))?;
    Ok(parsed)
}

/// The bytes of an identity, decrypted if `age -p` encrypted them.
fn decrypted(identity: &Identity, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<Zeroizing<Vec<u8>>> {
    let content = identity.load(interrupt)?;
    if !is_encrypted(&content) {
        return Ok(content);
    }
    let context = |error: Error| error.context(identity.place());
    let mut file = Vec::new();
    age::armor::ArmoredReader::new(&**content)
        .read_to_end(&mut file)
        .map_err(|_| context(Error::corrupt("it is damaged")))?;
    let decryptor = Decryptor::new_buffered(&*file).map_err(|error| context(not_opened(&error)))?;
    if !decryptor.is_scrypt() {
        return Err(context(Error::invalid_argument("it is encrypted to a recipient; only a passphrase is supported")));
    }
    let mut key = scrypt::Identity::new(SecretString::from(identity.passphrase()?.as_str()));
    key.set_max_work_factor(MAX_WORK_FACTOR);
    decrypt_by_scrypt(&file, &key).and_then(plain_text).map_err(context)
}

fn parse_identities(content: &[u8], identity: &Identity, parsed: &mut Identities) -> Result<()> {
    if is_ssh(content) {
        let key = match parse_ssh(content)? {
            ssh::Identity::Encrypted(key) => {
                let passphrase = SecretString::from(identity.passphrase()?.as_str());
                ssh::Identity::from(key.decrypt(passphrase).map_err(|error| not_opened(&error))?)
            }
            other => other,
        };
        parsed.push(Box::new(key));
        return Ok(());
    }
    let identities = parse_identity_file(content)?.into_identities().map_err(|error| not_opened(&error))?;
    if identities.is_empty() {
        return Err(Error::invalid_argument("it contains no identity"));
    }
    parsed.extend(identities);
    Ok(())
}

fn is_ssh(content: &[u8]) -> bool {
    content.trim_ascii_start().starts_with(b"-----BEGIN ")
}

fn parse_ssh(content: &[u8]) -> Result<ssh::Identity> {
    match ssh::Identity::from_buffer(content.trim_ascii_start(), None) {
        Ok(ssh::Identity::Unsupported(kind)) => Err(Error::invalid_argument(match kind {
            UnsupportedKey::EncryptedPem => {
                "it is an SSH key in the old PEM format; ssh-keygen -p -o converts it".to_owned()
            }
            UnsupportedKey::EncryptedSsh(cipher) => {
                format!("it is an SSH key encrypted with {cipher}, which age does not support")
            }
            UnsupportedKey::Hardware(kind) => {
                format!("it is an SSH key on a security key ({kind}), which age cannot use")
            }
            UnsupportedKey::Type(kind) => {
                format!("it is an SSH key of type {kind}; age supports ssh-ed25519 and ssh-rsa")
            }
        })),
        Ok(identity) => Ok(identity),
        Err(_) => Err(Error::invalid_argument("it is not an SSH key that age can read")),
    }
}

fn parse_identity_file(content: &[u8]) -> Result<IdentityFile<NoCallbacks>> {
    // The crate's own message quotes the line, which may be a secret. This one has only its number.
    let parsed = IdentityFile::from_buffer(BufReader::new(content));
    parsed.map_err(|_| {
        let text = String::from_utf8_lossy(content);
        let line = text.lines().position(|line| {
            !(line.is_empty() || line.starts_with('#') || IdentityFile::from_buffer(line.as_bytes()).is_ok())
        });
        let reason = match line.and_then(|index| text.lines().nth(index)) {
            Some(line) if line.starts_with("AGE-SECRET-KEY-PQ-") => {
                "is a post-quantum identity, which this version does not support; wrap the key for another identity \
                 with the age command"
            }
            Some(line) if line.starts_with("age1") => "is a recipient, not an identity (AGE-SECRET-KEY-…)",
            _ => "is not an identity (AGE-SECRET-KEY-…)",
        };
        Error::invalid_argument(format!("line {} {reason}", line.unwrap_or_default() + 1))
    })
}

fn no_plugin(error: &plugin::ResolveError) -> Error {
    let text = match error {
        plugin::ResolveError::MissingPlugin { binary_name } => {
            let hint = if binary_name == "age-plugin-pq" {
                " (post-quantum recipients, age1pq…, need this plugin)"
            } else {
                ""
            };
            format!("the program {binary_name} is not on the PATH{hint}: install it")
        }
        _ => "it does not name an age plugin".to_owned(),
    };
    Error::new(Kind::KeyUnavailable, text)
}

fn plugin_failed(errors: &[impl std::fmt::Display]) -> Error {
    let mut text = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    // Remove the marks around names in the crate's messages, and control characters in a plugin's message.
    text.retain(|character| !('\u{2066}'..='\u{2069}').contains(&character) && !character.is_control());
    Error::new(Kind::KeyUnavailable, format!("the plugin failed: {text}"))
}

fn not_wrapped(error: &EncryptError) -> Error {
    match error {
        EncryptError::Plugin(errors) => plugin_failed(errors),
        EncryptError::PluginResolve(error) => no_plugin(error),
        EncryptError::Io(error) => plugin_failed(&[error]),
        EncryptError::IncompatibleRecipients { .. } => Error::invalid_argument(
            "these recipients cannot be mixed: post-quantum recipients cannot be combined with others",
        ),
        _ => Error::invalid_argument("there are no recipients, or they cannot be mixed"),
    }
}

fn read_header(file: &[u8]) -> Result<Decryptor<&[u8]>> {
    Decryptor::new_buffered(file).map_err(|error| match error {
        // The crate also reports this for a header that it cannot parse.
        DecryptError::UnknownFormat if file.starts_with(b"age-encryption.org/v1\n") => {
            not_opened(&DecryptError::InvalidHeader)
        }
        error => not_opened(&error),
    })
}

fn not_opened(error: &DecryptError) -> Error {
    match error {
        DecryptError::NoMatchingKeys => Error::new(
            Kind::Authentication,
            "none of the identities opens it: it is encrypted to other recipients, or it is damaged",
        ),
        DecryptError::ExcessiveWork { required, .. } => Error::new(
            Kind::Unsupported,
            format!(
                "its scrypt work factor is 2^{required}, which could take hours; the limit is 2^{MAX_WORK_FACTOR}: \
                 wrap it again with the age command"
            ),
        ),
        DecryptError::UnknownFormat => {
            Error::new(Kind::Unsupported, "it is wrapped by an unknown version of age; install a newer vmsnap")
        }
        DecryptError::InvalidHeader => Error::corrupt("its age header is damaged or truncated"),
        DecryptError::Io(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            Error::corrupt("its age header is truncated")
        }
        DecryptError::Io(error) => plugin_failed(&[error]),
        DecryptError::Plugin(errors) => plugin_failed(errors),
        DecryptError::PluginResolve(error) => no_plugin(error),
        DecryptError::DecryptionFailed | DecryptError::InvalidMac | DecryptError::KeyDecryptionFailed | _ => {
            Error::new(Kind::Authentication, "the passphrase or identity is wrong, or the file is damaged")
        }
    }
}
