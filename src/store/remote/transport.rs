//! HTTP between the client of a store and the network: timeouts, and answers that are checked before they are believed.

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::time::Duration;

use bytes::BytesMut;
use futures_util::StreamExt;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, ReqwestConnector,
};
use object_store::{ClientConfigKey, ClientOptions, HeaderMap};

/// The longest time without a byte of an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// The shortest time that a request with a body is given, until its answer begins.
const SHORTEST_UPLOAD: Duration = Duration::from_secs(60);

/// A slower upload counts as broken: 64 KiB in a second.
const SLOWEST_UPLOAD_BYTES_PER_SECOND: u64 = 64 << 10;

/// The time for a store to put the parts of an upload together, which may mean that it copies all of them.
const COMPLETION_TIMEOUT: Duration = Duration::from_secs(600);

/// The most bytes of the text of an error.
const MAX_ERROR_BYTES: usize = 16 << 10;

/// Makes the HTTP clients of a store.
#[derive(Debug)]
pub(super) struct Connector {
    /// The region of the requests, if the store has regions.
    pub(super) region: Option<String>,
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let options = options.clone().with_timeout_disabled();
        let read_timeout = options.get_config_value(&ClientConfigKey::ReadTimeout);
        let reading =
            if read_timeout.is_some() { options.clone() } else { options.clone().with_read_timeout(READ_TIMEOUT) };
        // The client's read timeout runs while a body is sent, too. A request with a body has its own timeout.
        let writing = options.with_read_timeout(COMPLETION_TIMEOUT);
        Ok(HttpClient::new(Transport {
            reading: ReqwestConnector::default().connect(&reading)?,
            writing: ReqwestConnector::default().connect(&writing)?,
            region: self.region.clone(),
        }))
    }
}

#[derive(Debug)]
struct Transport {
    reading: HttpClient,
    writing: HttpClient,
    region: Option<String>,
}

/// An answer that is not believed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// A range was asked for, and the answer is another range or the whole object.
    IgnoresRanges,
    /// The bucket is in this region.
    Region(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::IgnoresRanges => f.write_str("the answer is not the range that was asked for"),
            Self::Region(region) => write!(f, "the bucket is in the region {region}"),
        }
    }
}

impl std::error::Error for Refusal {}

fn refuse(refusal: Refusal) -> HttpError {
    HttpError::new(HttpErrorKind::Unknown, refusal)
}

impl object_store::client::HttpService for Transport {
    fn call<'s, 'a>(
        &'s self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'a>>
    where
        's: 'a,
        Self: 'a,
    {
        Box::pin(async move {
            let asked = header(request.headers(), "range").and_then(parse_range);
            let response = match upload_timeout(&request) {
                None => self.reading.execute(request).await?,
                Some(most) => match tokio::time::timeout(most, self.writing.execute(request)).await {
                    Ok(response) => response?,
                    Err(elapsed) => return Err(HttpError::new(HttpErrorKind::Timeout, elapsed)),
                },
            };
            self.check(asked, response).await
        })
    }
}

impl Transport {
    async fn check(&self, asked: Option<Range<u64>>, response: HttpResponse) -> Result<HttpResponse, HttpError> {
        let status = response.status().as_u16();
        if matches!(status, 301 | 307 | 400)
            && let Some(own) = &self.region
            && let Some(region) = header(response.headers(), "x-amz-bucket-region")
            && region != own
        {
            return Err(refuse(Refusal::Region(region.to_owned())));
        }
        match (status, asked) {
            (200..=299, Some(asked)) => {
                let range = header(response.headers(), "content-range").and_then(parse_content_range);
                if status == 206 && range.is_some_and(|(range, size)| range == (asked.start..asked.end.min(size))) {
                    Ok(response)
                } else {
                    Err(refuse(Refusal::IgnoresRanges))
                }
            }
            (400.., _) => {
                let (parts, body) = response.into_parts();
                let (mut stream, mut text) = (body.bytes_stream(), BytesMut::new());
                // The text may break off: only the status is needed.
                while let Some(Ok(chunk)) = stream.next().await {
                    text.extend_from_slice(&chunk[..chunk.len().min(MAX_ERROR_BYTES - text.len())]);
                    if text.len() == MAX_ERROR_BYTES {
                        break;
                    }
                }
                let text = String::from_utf8_lossy(&text).into_owned();
                Ok(HttpResponse::from_parts(parts, text.into()))
            }
            _ => Ok(response),
        }
    }
}

/// The time for a request with a body, until its answer begins.
fn upload_timeout(request: &HttpRequest) -> Option<Duration> {
    let bytes = request.body().content_length() as u64;
    match request.method().as_str() {
        "PUT" if bytes > 0 => Some(SHORTEST_UPLOAD.max(Duration::from_secs(bytes / SLOWEST_UPLOAD_BYTES_PER_SECOND))),
        "POST" if request.uri().query().is_some_and(|query| query.contains("uploadId=")) => Some(COMPLETION_TIMEOUT),
        _ => None,
    }
}

fn header<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// The range in a header `Range: bytes=first-last`.
fn parse_range(text: &str) -> Option<Range<u64>> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    Some(first.parse().ok()?..last.parse::<u64>().ok()?.checked_add(1)?)
}

/// The range and the size of the whole object in a header `Content-Range: bytes first-last/size`.
fn parse_content_range(text: &str) -> Option<(Range<u64>, u64)> {
    let (range, size) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    Some((first.parse().ok()?..last.parse::<u64>().ok()?.checked_add(1)?, size.parse().ok()?))
}
