//! A server with the interface of S3 that keeps objects, and fails at a chosen request.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::test_server::{Reply, Request, Server};
use crate::threads::lock;

/// The server. Dropping it does not end it.
pub(crate) struct TestStore {
    server: Server,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    objects: BTreeMap<String, Stored>,
    uploads: BTreeMap<String, (Stored, BTreeMap<usize, Vec<u8>>)>,
    last_id: usize,
    requests: usize,
    /// From this request on, no answer arrives.
    dies_at: Option<usize>,
    /// Whether the first of these requests is still carried out.
    loses_answer: bool,
    log: Vec<String>,
}

#[derive(Clone, Default)]
struct Stored {
    bytes: Vec<u8>,
    metadata: Option<String>,
    etag: String,
}

impl TestStore {
    pub(crate) fn start() -> Self {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let answering = Arc::clone(&shared);
        Self { server: Server::start(move |_, request| lock(&answering).answer(request)), shared }
    }

    pub(crate) fn endpoint(&self) -> String {
        self.server.endpoint()
    }

    /// Lets no answer arrive from the next request but `number` on. With `loses_answer`, that request itself is carried
    /// out.
    pub(crate) fn die_at(&self, number: usize, loses_answer: bool) {
        let mut shared = lock(&self.shared);
        shared.dies_at = Some(shared.requests + number);
        shared.loses_answer = loses_answer;
    }

    /// Answers again. Returns whether a request was not answered.
    pub(crate) fn revive(&self) -> bool {
        let mut shared = lock(&self.shared);
        let dies_at = shared.dies_at.take();
        dies_at.is_some_and(|dies_at| shared.requests > dies_at)
    }

    /// The names of all objects below the prefix `vm1`.
    pub(crate) fn names(&self) -> Vec<String> {
        lock(&self.shared).objects.keys().map(|key| key.strip_prefix("vm1/").unwrap().to_owned()).collect()
    }

    pub(crate) fn get(&self, name: &str) -> Option<Vec<u8>> {
        lock(&self.shared).objects.get(&format!("vm1/{name}")).map(|stored| stored.bytes.clone())
    }

    pub(crate) fn put(&self, name: &str, bytes: &[u8]) {
        let stored = Stored { bytes: bytes.to_vec(), ..Stored::default() };
        lock(&self.shared).store(&format!("vm1/{name}"), stored);
    }

    /// Removes all uploads that were not completed, as a lifecycle rule does.
    pub(crate) fn expire_uploads(&self) {
        lock(&self.shared).uploads.clear();
    }

    pub(crate) fn open_uploads(&self) -> usize {
        lock(&self.shared).uploads.len()
    }

    /// The requests since the last call: `PUT vm1/mem`.
    pub(crate) fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.shared).log)
    }
}

impl Shared {
    fn answer(&mut self, request: &Request) -> Reply {
        let number = self.requests;
        self.requests += 1;
        let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
        let key = decoded(path.strip_prefix("/bucket").unwrap().trim_start_matches('/'));
        self.log.push(format!("{} {key}", request.method));
        match self.dies_at {
            Some(dies_at) if number > dies_at || (number == dies_at && !self.loses_answer) => Reply::Close,
            Some(dies_at) if number == dies_at => {
                let _ = self.carry_out(request, &key, query);
                Reply::Close
            }
            _ => self.carry_out(request, &key, query),
        }
    }

    fn carry_out(&mut self, request: &Request, key: &str, query: &str) -> Reply {
        let query: BTreeMap<_, _> = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, ""))).collect();
        let upload = query.get("uploadId").copied();
        match (&*request.method, upload) {
            ("GET", _) if query.contains_key("list-type") => self.list(&decoded(query["prefix"])),
            ("GET" | "HEAD", _) => self.read(request, key),
            ("PUT", None) => self.write(request, key),
            ("PUT", Some(id)) => {
                let number = query["partNumber"].parse().unwrap();
                let Some((_, parts)) = self.uploads.get_mut(id) else { return Reply::error(404, "NoSuchUpload", "") };
                parts.insert(number, request.body.clone());
                Reply::status(200).with("ETag", &format!("\"part {number}\""))
            }
            ("POST", None) if query.contains_key("uploads") => {
                self.last_id += 1;
                let id = format!("upload{}", self.last_id);
                self.uploads.insert(id.clone(), (new(request), BTreeMap::new()));
                let xml =
                    format!("<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>");
                Reply::object(xml.as_bytes())
            }
            ("POST", Some(id)) => {
                let Some((mut stored, parts)) = self.uploads.remove(id) else {
                    return Reply::error(404, "NoSuchUpload", "");
                };
                stored.bytes = parts.into_values().flatten().collect();
                let etag = self.store(key, stored);
                let xml = format!(
                    "<CompleteMultipartUploadResult><ETag>{etag}</ETag><Bucket>bucket</Bucket><Key>k</Key>\
                     <Location>l</Location></CompleteMultipartUploadResult>"
                );
                Reply::object(xml.as_bytes())
            }
            ("POST", None) if query.contains_key("delete") => {
                let body = String::from_utf8(request.body.clone()).unwrap();
                let keys = body.split("<Key>").skip(1).map(|rest| rest.split_once("</Key>").unwrap().0);
                let deleted = keys.map(|key| {
                    self.objects.remove(key);
                    format!("<Deleted><Key>{key}</Key></Deleted>")
                });
                let deleted: String = deleted.collect();
                Reply::object(format!("<DeleteResult>{deleted}</DeleteResult>").as_bytes())
            }
            ("DELETE", Some(id)) => {
                self.uploads.remove(id);
                Reply::status(204)
            }
            ("DELETE", None) => {
                self.objects.remove(key);
                Reply::status(204)
            }
            _ => Reply::error(501, "NotImplemented", ""),
        }
    }

    fn store(&mut self, key: &str, mut stored: Stored) -> String {
        self.last_id += 1;
        stored.etag = format!("\"{}\"", self.last_id);
        let etag = stored.etag.clone();
        self.objects.insert(key.to_owned(), stored);
        etag
    }

    fn write(&mut self, request: &Request, key: &str) -> Reply {
        let there = self.objects.get(key);
        let fits = match (request.header("if-none-match"), request.header("if-match")) {
            (Some(_), _) => there.is_none(),
            (None, Some(etag)) => there.is_some_and(|stored| stored.etag == etag),
            (None, None) => true,
        };
        if !fits {
            return Reply::error(412, "PreconditionFailed", "");
        }
        let stored = Stored { bytes: request.body.clone(), ..new(request) };
        let etag = self.store(key, stored);
        Reply::status(200).with("ETag", &etag)
    }

    fn read(&self, request: &Request, key: &str) -> Reply {
        let Some(stored) = self.objects.get(key) else { return Reply::error(404, "NoSuchKey", "") };
        let size = stored.bytes.len();
        let reply = match request.header("range").and_then(|range| range.strip_prefix("bytes=")?.split_once('-')) {
            None => Reply::object(&stored.bytes),
            Some((start, end)) => {
                let (start, end): (usize, usize) = (start.parse().unwrap(), end.parse().unwrap());
                if start >= size {
                    return Reply::error(416, "InvalidRange", "");
                }
                let end = end.min(size - 1);
                Reply::part(&format!("bytes {start}-{end}/{size}"), &stored.bytes[start..=end])
            }
        };
        let reply = reply.with("ETag", &stored.etag);
        match &stored.metadata {
            Some(proof) => reply.with("x-amz-meta-vmsnapproof", proof),
            None => reply,
        }
    }

    fn list(&self, prefix: &str) -> Reply {
        let now = humantime::format_rfc3339_seconds(std::time::SystemTime::now());
        let entry = |(key, stored): (&String, &Stored)| {
            format!(
                "<Contents><Key>{key}</Key><LastModified>{now}</LastModified><ETag>1</ETag><Size>{}</Size></Contents>",
                stored.bytes.len()
            )
        };
        let entries: String = self.objects.iter().filter(|(key, _)| key.starts_with(prefix)).map(entry).collect();
        Reply::object(format!("<ListBucketResult>{entries}</ListBucketResult>").as_bytes())
    }
}

fn new(request: &Request) -> Stored {
    Stored { metadata: request.header("x-amz-meta-vmsnapproof").map(str::to_owned), ..Stored::default() }
}

fn decoded(text: &str) -> String {
    let mut parts = text.split('%');
    let mut bytes = parts.next().unwrap().as_bytes().to_vec();
    for part in parts {
        bytes.push(u8::from_str_radix(&part[..2], 16).unwrap());
        bytes.extend(&part.as_bytes()[2..]);
    }
    String::from_utf8(bytes).unwrap()
}
