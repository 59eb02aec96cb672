//! Replaces `age.rs` in a build without the feature `age`: every function returns an error.

#![expect(
    clippy::needless_pass_by_value,
    clippy::unnecessary_wraps,
    reason = "the functions have the signatures of age.rs"
)]

use std::sync::Arc;

use zeroize::Zeroizing;

use super::identity::Identity;
use super::recipients_file::NoRecipient;
use super::secret_text::SecretText;
use crate::error::{Error, Kind, Result};

type Interrupt<'a> = &'a mut dyn FnMut() -> Result<()>;

pub(super) enum Parsed {}
pub(super) enum Identities {}

fn absent<T>() -> Result<T> {
    Err(Error::new(
        Kind::Unsupported,
        "this build of vmsnap does not support age (recipients, identities, passphrases): build it with the feature \
         `age`, or pass a key",
    ))
}

pub(super) fn check_present() -> Result<()> {
    absent()
}

pub(super) fn generate() -> Result<(SecretText, String)> {
    absent()
}

pub(super) fn identity_file(identity: &str, recipient: &str) -> String {
    format!("# public key: {recipient}\n{identity}\n")
}

pub(super) fn parse_recipients(_texts: &[String]) -> Result<Parsed> {
    absent()
}

pub(super) fn check_recipient(_text: &str) -> std::result::Result<(), NoRecipient> {
    absent().map_err(NoRecipient::NoAge)
}

pub(super) fn recipients_of(_content: &[u8], _place: &str) -> Result<Parsed> {
    absent()
}

pub(super) fn public_halves(_identity: &Identity, _interrupt: Interrupt<'_>) -> Result<Vec<String>> {
    absent()
}

pub(super) fn wrap(_payload: &[u8], recipients: Parsed, _interrupt: Interrupt<'_>) -> Result<Vec<u8>> {
    match recipients {}
}

pub(super) fn wrap_with_passphrase(
    _payload: &[u8],
    _passphrase: &SecretText,
    _interrupt: Interrupt<'_>,
) -> Result<Vec<u8>> {
    absent()
}

pub(super) fn unwrap(_file: &[u8], identities: Identities, _interrupt: Interrupt<'_>) -> Result<Zeroizing<Vec<u8>>> {
    match identities {}
}

pub(super) fn unwrap_with_passphrase(
    _file: &[u8],
    _passphrase: impl FnOnce() -> Result<Arc<SecretText>>,
    _interrupt: Interrupt<'_>,
) -> Result<Zeroizing<Vec<u8>>> {
    absent()
}

pub(super) fn stanzas(_file: &[u8]) -> Result<Vec<String>> {
    Ok(Vec::new())
}

pub(super) fn load(_identities: &[Identity], _interrupt: Interrupt<'_>) -> Result<Identities> {
    absent()
}

pub(super) fn parse_default(_content: &[u8], _place: &str) -> Result<Identities> {
    absent()
}
