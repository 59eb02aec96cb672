//! Errors of the client as errors of vmsnap.
//!
//! | event | error |
//! |---|---|
//! | absent object or bucket | `Io` with `ENOENT` |
//! | there already | `Io` with `EEXIST` |
//! | no access, no or expired credentials | `Io` with `EACCES`, which names the places of credentials |
//! | timeout, no connection, failure of the server | `Io` with `ETIMEDOUT`, the errno or `EIO`; transient |
//! | another version, a shorter object, another range | `Corrupt` |
//! | another region, a store without conditional writes | `InvalidArgument`, with what to do |

use std::error::Error as StdError;
use std::io;

use object_store::client::{HttpError, HttpErrorKind};
use rustix::io::Errno;

use super::credentials::looked_at;
use super::settings::Settings;
use super::transport::Refusal;
use crate::error::{Error, Kind};
use crate::location::Scheme;

/// The most characters of a text of the server in an error.
const MAX_TEXT_CHARS: usize = 300;

/// The beginning of the client's text for an answer that is an error, before its status and body.
const ANSWERED: &str = "Server returned non-2xx status code: ";

/// An answer of the server that is an error.
struct Answer {
    status: u16,
    /// The name of the error, such as `NoSuchBucket`; may be empty.
    code: String,
    message: String,
    /// The region of the bucket, if the server says that it is another one.
    region: Option<String>,
}

/// The errors that the primitives tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// There is no such object, or, if only headers were asked for, no such bucket.
    Absent,
    Exists,
    /// It is another version than the expected one.
    Changed,
    /// It may work if it is tried again. The request may have been carried out.
    Transient,
    Other,
}

pub(super) fn event(error: &object_store::Error) -> Event {
    let answer = answer(error);
    match error {
        object_store::Error::NotFound { .. }
            if !answer.as_ref().is_some_and(|answer| answer.is_about_bucket() || answer.is_refusal()) =>
        {
            Event::Absent
        }
        object_store::Error::AlreadyExists { .. } => Event::Exists,
        object_store::Error::Precondition { .. } | object_store::Error::NotModified { .. } => Event::Changed,
        error if transient(error, answer.as_ref()).is_some() => Event::Transient,
        _ => Event::Other,
    }
}

/// The error of a request. `doing` says what failed: "cannot be read".
pub(super) fn of_request(doing: &str, error: &object_store::Error, settings: &Settings) -> Error {
    let answer = answer(error);
    let said = answer.as_ref().map(Answer::text).unwrap_or_default();
    let bucket = &settings.bucket;
    if let Some(region) = wrong_region(error, answer.as_ref()) {
        return Error::invalid_argument(format!(
            "{doing}: the bucket {bucket} is in the region {region}, not in {}; set AWS_REGION={region} or the storage \
             option 'region'",
            settings.region()
        ));
    }
    if find::<Refusal>(error).is_some() {
        let text =
            format!("{doing}: the server ignores ranges, or a proxy on the way does: its answer is another range");
        return Error::corrupt(text);
    }
    if answer.as_ref().is_some_and(Answer::is_about_bucket) {
        return Error::io(format!("{doing}: there is no bucket {bucket}{said}"), Errno::NOENT);
    }
    if answer.as_ref().is_some_and(Answer::is_expired) {
        let text = format!("{doing}: the credentials for the bucket {bucket} have expired{said}; renew them");
        return Error::io(text, Errno::ACCESS);
    }
    if answer.as_ref().is_some_and(Answer::is_refusal) {
        return refused(doing, answer.as_ref(), &said, settings);
    }
    match error {
        object_store::Error::NotFound { .. } => Error::io(format!("{doing}: it is not in the bucket"), Errno::NOENT),
        object_store::Error::AlreadyExists { .. } => Error::io(format!("{doing}: it exists already"), Errno::EXIST),
        object_store::Error::Precondition { .. } | object_store::Error::NotModified { .. } => {
            Error::corrupt(format!("{doing}: it was replaced by another version meanwhile"))
        }
        object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
            refused(doing, answer.as_ref(), &said, settings)
        }
        object_store::Error::NotImplemented { .. } | object_store::Error::NotSupported { .. } => {
            no_condition(doing, &said)
        }
        object_store::Error::InvalidPath { .. } => {
            Error::invalid_argument(format!("{doing}: the store has a name that is not allowed: {}", root_text(error)))
        }
        _ => other(doing, error, answer.as_ref(), &said, settings),
    }
}

fn other(doing: &str, error: &object_store::Error, answer: Option<&Answer>, said: &str, settings: &Settings) -> Error {
    if let Some(errno) = transient(error, answer) {
        let cause = match answer {
            Some(_) => format!("the server failed{said}"),
            None if errno == Errno::TIMEDOUT => "the server did not answer in time".to_owned(),
            None => format!("the connection failed ({})", root_text(error)),
        };
        return Error::transient(format!("{doing}: {cause}; try again later"), errno);
    }
    match answer {
        Some(Answer { status: 416, .. }) => Error::corrupt(format!("{doing}: it is shorter than expected")),
        Some(Answer { status: 501, .. }) => no_condition(doing, said),
        Some(_) => Error::io(format!("{doing}: the server refused the request{said}"), Errno::IO),
        None if root_text(error).contains("redirect without LOCATION") => Error::invalid_argument(format!(
            "{doing}: the bucket {} is at another address: check the region ({}) and the endpoint",
            settings.bucket,
            settings.region()
        )),
        None => Error::io(format!("{doing}: the client of the store failed ({})", root_text(error)), Errno::IO),
    }
}

fn refused(doing: &str, answer: Option<&Answer>, said: &str, settings: &Settings) -> Error {
    // S3 hides from those who may not list a bucket whether an object is absent.
    let hint = match answer {
        Some(answer) if settings.scheme == Scheme::S3 && answer.code == "AccessDenied" => {
            "; without the permission s3:ListBucket an absent object, too, gets this answer"
        }
        _ => "",
    };
    let text = format!(
        "{doing}: the bucket {} refused access{said}{hint}; looked for credentials at the storage options, {}",
        settings.bucket,
        looked_at(settings.scheme)
    );
    Error::io(text, Errno::ACCESS)
}

fn no_condition(doing: &str, said: &str) -> Error {
    Error::invalid_argument(format!(
        "{doing}: the store has no conditional writes{said}, without which two writers could mix their snapshots; use \
         another store"
    ))
}

/// The error of settings with which no client can be made.
pub(super) fn of_settings(error: &object_store::Error, settings: &Settings) -> Error {
    let mut text = format!("the settings of the bucket {} cannot be used: {}", settings.bucket, root_text(error));
    if settings.scheme == Scheme::Az && !settings.has("azure_storage_account_name") {
        text.push_str("; set AZURE_STORAGE_ACCOUNT_NAME or the storage option 'account_name'");
    }
    Error::invalid_argument(text)
}

impl Answer {
    fn is_about_bucket(&self) -> bool {
        self.status == 404 && matches!(&*self.code, "NoSuchBucket" | "ContainerNotFound")
            || self.message.contains("specified bucket does not exist")
    }

    /// Whether the credentials are refused. Some servers do so with the status of an absent object.
    fn is_refusal(&self) -> bool {
        matches!(
            &*self.code,
            "AccessDenied" | "AuthenticationFailed" | "InvalidAccessKeyId" | "InvalidToken" | "SignatureDoesNotMatch"
        )
    }

    fn is_expired(&self) -> bool {
        matches!(&*self.code, "ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired" | "RequestExpired")
    }

    /// The text for an error: ` (403 AccessDenied: Access Denied)`.
    fn text(&self) -> String {
        let code = if self.code.is_empty() { String::new() } else { format!(" {}", self.code) };
        let message = if self.message.is_empty() { String::new() } else { format!(": {}", self.message) };
        format!(" ({}{code}{message})", self.status)
    }
}

/// The answer in the text of an error: the client shows it, and nothing else.
fn answer(error: &object_store::Error) -> Option<Answer> {
    let text = chain(error).find_map(|error| {
        let text = error.to_string();
        text.strip_prefix(ANSWERED).map(str::to_owned)
    })?;
    let (status, body) = text.split_once(": ").unwrap_or((&text, ""));
    let element = |name: &str| {
        let (_, rest) = body.split_once(&format!("<{name}>"))?;
        Some(clean(rest.split_once(&format!("</{name}>"))?.0))
    };
    let (code, message) = (element("Code").unwrap_or_default(), element("Message").unwrap_or_default());
    let region = (code == "AuthorizationHeaderMalformed" || code == "PermanentRedirect")
        .then(|| {
            element("Region").or_else(|| Some(message.split_once("expecting '")?.1.split_once('\'')?.0.to_owned()))
        })
        .flatten();
    Some(Answer { status: status.get(..3)?.parse().ok()?, code, message, region })
}

fn wrong_region(error: &object_store::Error, answer: Option<&Answer>) -> Option<String> {
    if let Some(Refusal::Region(region)) = find::<Refusal>(error) {
        return Some(clean(region));
    }
    answer?.region.clone()
}

/// The errno of a failure that may not happen again.
fn transient(error: &object_store::Error, answer: Option<&Answer>) -> Option<Errno> {
    if let Some(Answer { status, .. }) = answer {
        return matches!(status, 408 | 429 | 500 | 502..=599).then_some(Errno::IO);
    }
    let http = find::<HttpError>(error)?;
    // A certificate that is refused today is refused tomorrow, too.
    if find::<Refusal>(error).is_some() || root_text(error).contains("certificate") {
        return None;
    }
    match http.kind() {
        HttpErrorKind::Timeout => Some(Errno::TIMEDOUT),
        HttpErrorKind::Connect | HttpErrorKind::Request | HttpErrorKind::Interrupted | HttpErrorKind::Decode => {
            let errno = find::<io::Error>(error).and_then(io::Error::raw_os_error);
            Some(errno.map_or(Errno::IO, Errno::from_raw_os_error))
        }
        _ => None,
    }
}

/// An error and its causes.
fn chain<'e>(error: &'e (dyn StdError + 'static)) -> impl Iterator<Item = &'e (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |&error: &&'e (dyn StdError + 'static)| error.source())
}

fn find<T: StdError + 'static>(error: &object_store::Error) -> Option<&T> {
    chain(error).find_map(|error| error.downcast_ref::<T>())
}

/// The text of the last cause. It is the shortest, and has no URL in it.
fn root_text(error: &object_store::Error) -> String {
    clean(&chain(error).last().map(ToString::to_string).unwrap_or_default())
}

/// A text of the server for an error: one line, and not too long.
fn clean(text: &str) -> String {
    text.chars().map(|each| if each.is_control() { ' ' } else { each }).take(MAX_TEXT_CHARS).collect()
}

/// An object that changed between two requests of one call.
pub(super) fn replaced(doing: &str) -> Error {
    Error::new(Kind::State, format!("{doing}: another process changed it at the same time; try again"))
}
