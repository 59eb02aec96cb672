//! Files of recipients, one per line, in the format of `age -R`.

use std::path::Path;

use super::secret_file;
use super::{age, identity};
use crate::error::{Error, Result};

/// The reason why a text is not a usable recipient.
#[cfg_attr(not(feature = "age"), expect(dead_code, reason = "nothing is parsed"))]
pub(super) enum NoRecipient {
    /// It is an identity, which is a secret.
    Identity,
    Malformed,
    /// It is an SSH key that age cannot encrypt to; the text says why.
    Unusable(String),
    /// There is no age in this build.
    #[cfg(not(feature = "age"))]
    NoAge(Error),
}

pub(super) const IS_IDENTITY: &str =
    "is an identity (AGE-…), which is secret; pass the recipient (age1…) that belongs to it";
pub(super) const IS_MALFORMED: &str =
    "is not an age recipient: expected age1… or an SSH public key (ssh-ed25519 AAAA…, ssh-rsa AAAA…)";

/// The contents of a file of recipients.
pub(crate) struct RecipientsFile {
    /// At least one recipient.
    pub(crate) recipients: Vec<String>,
    /// Warnings: lines with SSH keys that age does not support.
    pub(crate) ignored: Vec<String>,
}

impl RecipientsFile {
    /// Reads a file of recipients. It skips empty lines, comments after `#`, comments of SSH keys and, like `age -R`,
    /// valid SSH keys of a type that age does not support. If no recipient is left, that is an error.
    pub(crate) fn read(path: impl AsRef<Path>, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<Self> {
        let path = path.as_ref();
        let content = secret_file::read(path, interrupt).and_then(|content| Self::parse(&content));
        content.map_err(|error| error.context(path.display()))
    }

    fn parse(content: &[u8]) -> Result<Self> {
        if identity::is_utf16(content) {
            return Err(Error::invalid_argument("the file is encoded in UTF-16; save it in UTF-8"));
        }
        let text = String::from_utf8_lossy(identity::without_mark(content));
        let (mut recipients, mut ignored) = (Vec::new(), Vec::new());
        for (index, line) in text.lines().enumerate() {
            let number = index + 1;
            let recipient = without_comment(line);
            if recipient.is_empty() {
                continue;
            }
            // An error never quotes the line: it may be from the wrong file, and confidential.
            match age::check_recipient(&recipient) {
                Ok(()) => recipients.push(recipient),
                Err(NoRecipient::Unusable(why)) => ignored.push(format!("line {number} is ignored: {why}")),
                Err(NoRecipient::Malformed) => {
                    return Err(Error::invalid_argument(format!("line {number} {IS_MALFORMED}")));
                }
                Err(NoRecipient::Identity) => {
                    return Err(Error::invalid_argument(format!("line {number} {IS_IDENTITY}")));
                }
                #[cfg(not(feature = "age"))]
                Err(NoRecipient::NoAge(error)) => return Err(error),
            }
        }
        if !recipients.is_empty() {
            return Ok(Self { recipients, ignored });
        }
        Err(Error::invalid_argument(match ignored.first() {
            None => "the file contains no recipients; write one per line (age1… or an SSH public key)".to_owned(),
            Some(first) => format!("the file contains no recipients that age supports; {first}"),
        }))
    }
}

/// A line without its comment: an age recipient ends before `#`, an SSH key after its type and key.
fn without_comment(line: &str) -> String {
    let line = line.trim();
    if line.starts_with('#') {
        return String::new();
    }
    let words: Vec<_> = line.split_ascii_whitespace().collect();
    match words[..] {
        [recipient, comment, ..] if comment.starts_with('#') => recipient.to_owned(),
        [kind, key, ..] if !kind.starts_with("age1") => format!("{kind} {key}"),
        _ => line.to_owned(),
    }
}

#[cfg(all(test, feature = "age"))]
mod tests {
    use super::RecipientsFile;

    const AGE: &str = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj";
    const SSH: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHsKLqeplhpW+uObz5dvMgjz1OxfM/XXUB+VHtZ6isGN";
    const ECDSA: &str = "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBHFliOyIZs1gxGF3fmDxFykQhE88wy6A\
                         KDGFBfn0R6ZuvRmENABZQa9+pj9hMki+LX0qDJbmHTiWDbYv/cmFt/Q=";

    #[test]
    fn what_people_write_around_a_recipient_is_left_out() {
        for line in [AGE.to_owned(), format!("  {AGE}\t"), format!("{AGE} # alice"), format!("\u{feff}{AGE}\r")] {
            let found = RecipientsFile::parse(format!("{line}\n#x\n\r\n").as_bytes()).unwrap();
            assert_eq!((found.recipients, found.ignored.len()), (vec![AGE.to_owned()], 0), "{line:?}");
        }
        for line in [SSH.to_owned(), format!("{SSH} alice@host, the second"), SSH.replace(' ', " \t ")] {
            let found = RecipientsFile::parse(format!("# team\n{line}").as_bytes()).unwrap();
            assert_eq!(found.recipients, [SSH], "{line:?}");
        }
        let latin1 = [SSH.as_bytes(), b" m\xfcller@host\n"].concat();
        assert_eq!(RecipientsFile::parse(&latin1).unwrap().recipients, [SSH]);
    }

    #[test]
    fn ssh_keys_that_age_cannot_encrypt_to_are_ignored_and_all_else_is_an_error_with_its_line() {
        let found = RecipientsFile::parse(format!("{ECDSA} bob\n{AGE}\n").as_bytes()).unwrap();
        assert_eq!(found.recipients, [AGE]);
        assert!(found.ignored[0].starts_with("line 1 is ignored: ") && found.ignored[0].contains("nistp256"));
        for (text, said) in [
            (String::new(), "contains no recipients; "),
            ("# a\n\n  # b\r\n".to_owned(), "contains no recipients; "),
            (format!("\n{ECDSA}\n"), "contains no recipients that age supports; line 2 is ignored: "),
            (format!("{AGE}\nhunter2\n"), "line 2 is not an age recipient: expected age1"),
            (format!("{AGE} hunter2"), "line 1 is not an age recipient"),
            (format!("{AGE}\nAGE-SECRET-KEY-1HUNTER2"), "line 2 is an identity"),
            ("ecdsa-sha2-nistp256 AAAA hunter2".to_owned(), "line 1 is not an age recipient"),
            (format!("no-pty {SSH}"), "line 1 is not an age recipient"),
        ] {
            let error = RecipientsFile::parse(text.as_bytes()).map(|found| found.recipients).unwrap_err().to_string();
            assert!(error.contains(said) && !error.to_lowercase().contains("hunter2"), "{error}");
        }
        let utf16 = [b"\xff\xfe".as_slice(), &AGE.bytes().flat_map(|byte| [byte, 0]).collect::<Vec<_>>()].concat();
        assert!(RecipientsFile::parse(&utf16).map(|_| ()).unwrap_err().to_string().contains("UTF-16"));
    }
}
