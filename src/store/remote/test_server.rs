//! A small HTTP server, for answers that no real store gives.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use super::Bucket;
use super::settings::tests::url;
use crate::store::RemoteOptions;
use crate::threads::lock;

/// A request, as it came.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) method: String,
    pub(super) target: String,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

impl Request {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(other, _)| other.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }
}

#[derive(Clone, Debug)]
pub(super) enum Reply {
    /// A status, headers, and a body. Unless a header has another length, the length of the body is sent.
    Answer(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// The connection is closed without an answer.
    Close,
    /// There is never an answer.
    Hang,
}

impl Reply {
    pub(super) fn status(status: u16) -> Self {
        Self::Answer(status, Vec::new(), Vec::new())
    }

    /// An error in the form of S3.
    pub(super) fn error(status: u16, code: &str, more: &str) -> Self {
        let body = format!("<Error><Code>{code}</Code><Message>said {code}</Message>{more}</Error>");
        Self::Answer(status, Vec::new(), body.into_bytes())
    }

    /// A whole object.
    pub(super) fn object(body: &[u8]) -> Self {
        Self::Answer(200, vec![("ETag", "\"1\"".to_owned())], body.to_vec())
    }

    /// A part of an object.
    pub(super) fn part(content_range: &str, body: &[u8]) -> Self {
        let headers = vec![("ETag", "\"1\"".to_owned()), ("Content-Range", content_range.to_owned())];
        Self::Answer(206, headers, body.to_vec())
    }

    pub(super) fn with(mut self, name: &'static str, value: &str) -> Self {
        if let Self::Answer(_, headers, _) = &mut self {
            headers.retain(|(other, _)| *other != name);
            headers.push((name, value.to_owned()));
        }
        self
    }
}

/// A server on the loopback address. Its threads end with the process.
pub(super) struct Server {
    port: u16,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Starts a server that answers each request by its number, from 0 on.
    pub(super) fn start(answer: impl Fn(usize, &Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self { port: listener.local_addr().unwrap().port(), requests: Arc::default() };
        let (requests, answer) = (Arc::clone(&server.requests), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (requests, answer) = (Arc::clone(&requests), Arc::clone(&answer));
                std::thread::spawn(move || serve(stream.unwrap(), &requests, &*answer));
            }
        });
        server
    }

    pub(super) fn requests(&self) -> Vec<Request> {
        lock(&self.requests).clone()
    }

    pub(super) fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub(super) fn bucket(&self) -> Bucket {
        bucket_at(&self.endpoint())
    }
}

/// A bucket of a server with the interface of S3.
pub(super) fn bucket_at(endpoint: &str) -> Bucket {
    let options = [
        ("endpoint", endpoint),
        ("region", "eu-west-1"),
        ("access_key_id", "test"),
        ("secret_access_key", "of the test"),
    ];
    let storage_options = options.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    Bucket::new(url("s3://bucket/vm1"), RemoteOptions { storage_options, ..RemoteOptions::default() }).unwrap()
}

fn serve(stream: TcpStream, requests: &Mutex<Vec<Request>>, answer: &dyn Fn(usize, &Request) -> Reply) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut stream = stream;
    while let Some(request) = read(&mut reader) {
        let number = {
            let mut requests = lock(requests);
            requests.push(request.clone());
            requests.len() - 1
        };
        match answer(number, &request) {
            Reply::Close => return,
            Reply::Hang => loop {
                std::thread::park();
            },
            Reply::Answer(status, headers, body) => {
                let mut lines = vec![format!("HTTP/1.1 {status} Text")];
                // The date that S3 gives every object.
                lines.push("Last-Modified: Sat, 01 Nov 2025 00:00:00 GMT".to_owned());
                if !headers.iter().any(|(name, _)| *name == "Content-Length") {
                    lines.push(format!("Content-Length: {}", body.len()));
                }
                lines.extend(headers.iter().map(|(name, value)| format!("{name}: {value}")));
                let head = lines.join("\r\n");
                let is_short =
                    headers.iter().any(|(name, value)| *name == "Content-Length" && *value != body.len().to_string());
                let body: &[u8] = if request.method == "HEAD" { &[] } else { &body };
                let written =
                    stream.write_all(format!("{head}\r\n\r\n").as_bytes()).and_then(|()| stream.write_all(body));
                if written.is_err() || (is_short && request.method != "HEAD") {
                    return;
                }
            }
        }
    }
}

fn read(reader: &mut impl BufRead) -> Option<Request> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let line = line.trim_end().to_owned();
        if line.is_empty() {
            break;
        }
        lines.push(line);
    }
    let mut first = lines.first()?.split(' ');
    let (method, target) = (first.next()?.to_owned(), first.next()?.to_owned());
    let headers = lines[1..].iter().filter_map(|line| line.split_once(": "));
    let headers: Vec<_> = headers.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let mut request = Request { method, target, headers, body: Vec::new() };
    let length = request.header("content-length").map_or(0, |length| length.parse().unwrap());
    request.body.resize(length, 0);
    reader.read_exact(&mut request.body).ok()?;
    Some(request)
}
