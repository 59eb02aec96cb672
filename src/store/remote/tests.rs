//! The primitives, with the store in memory and with answers that no real store gives.

use bytes::Bytes;
use object_store::{Attribute, Attributes};

use super::settings::tests::url;
use super::test_server::{Reply, Server, bucket_at};
use super::{Bucket, Created, Got, Version, Wanted, runtime};
use crate::error::{Error, Result};
use crate::store::RemoteOptions;
use crate::threads::Interrupt;

const WHOLE: Wanted = Wanted::Whole { max_bytes: 1 << 20 };

/// Calls a primitive with an interrupt that never stops it.
fn with<T>(call: impl FnOnce(&mut Interrupt<'_>) -> Result<T>) -> Result<T> {
    call(&mut Interrupt::new(&mut || Ok(())))
}

fn in_memory(name: &str) -> Bucket {
    Bucket::new(url(&format!("memory://{name}/vm1")), RemoteOptions::default()).unwrap()
}

fn get(bucket: &Bucket, wanted: Wanted) -> Result<Got> {
    with(|interrupt| bucket.get("mem", wanted, None, interrupt))
}

fn create(bucket: &Bucket, bytes: &'static [u8]) -> Result<Created> {
    with(|interrupt| bucket.create("claim", Bytes::from_static(bytes), interrupt))
}

fn put(bucket: &Bucket, bytes: &'static [u8], replaced: Option<&Version>) -> Result<Version> {
    let bytes = Bytes::from_static(bytes);
    with(|interrupt| bucket.put("mem", bytes, Attributes::new(), replaced, interrupt))
}

#[test]
fn an_object_is_written_read_listed_and_removed() {
    let bucket = in_memory("objects");
    assert!(get(&bucket, WHOLE).unwrap_err().is_not_found());
    assert!(with(|interrupt| bucket.head("mem", interrupt)).unwrap().is_none());
    let attributes = Attributes::from_iter([(Attribute::Metadata("vmsnapproof".into()), "of the test")]);
    let bytes = Bytes::from_static(b"contents");
    let version = with(|interrupt| bucket.put("mem", bytes.clone(), attributes, None, interrupt)).unwrap();

    let got = get(&bucket, WHOLE).unwrap();
    assert_eq!((got.bytes, got.size, &got.version), (bytes, 8, &version));
    assert_eq!(get(&bucket, Wanted::Range(2..5)).unwrap().bytes, &b"nte"[..]);
    assert_eq!(get(&bucket, Wanted::Range(2..5)).unwrap().size, 8);
    assert!(get(&bucket, Wanted::Range(2..9)).unwrap_err().is_corrupt());
    assert!(get(&bucket, Wanted::Range(2..2)).unwrap_err().is_invalid_argument());
    assert!(get(&bucket, Wanted::Whole { max_bytes: 7 }).unwrap_err().is_corrupt());
    let headed = with(|interrupt| bucket.head("mem", interrupt)).unwrap().unwrap();
    assert_eq!((headed.size, headed.metadata("vmsnapproof")), (8, Some("of the test")));
    assert_eq!(headed.metadata("other"), None);

    let other = Bucket::new(url("memory://objects/vm10"), RemoteOptions::default()).unwrap();
    put(&other, b"of another snapshot", None).unwrap();
    let nested = Bytes::from_static(b"nested");
    with(|interrupt| bucket.put("devices/100% é", nested, Attributes::new(), None, interrupt)).unwrap();
    let listed = with(|interrupt| bucket.list(interrupt)).unwrap();
    let names: Vec<_> = listed.iter().map(|each| (&*each.name, each.size)).collect();
    assert_eq!(names, [("devices/100% é", 6), ("mem", 8)]);
    let all: Vec<_> = listed.into_iter().map(|each| each.name).chain(["absent".to_owned()]).collect();
    with(|interrupt| bucket.delete(&all, interrupt)).unwrap();
    assert_eq!(with(|interrupt| bucket.list(interrupt)).unwrap(), []);
    assert_eq!(with(|interrupt| other.list(interrupt)).unwrap().len(), 1);
}

#[test]
fn several_objects_are_read_at_once() {
    let bucket = in_memory("several");
    put(&bucket, b"contents", None).unwrap();
    let mut found = with(|interrupt| bucket.get_many(&[("absent", WHOLE), ("mem", WHOLE)], interrupt)).unwrap();
    assert_eq!(found.pop().unwrap().unwrap().unwrap().bytes, &b"contents"[..]);
    assert!(found.pop().unwrap().unwrap().is_none());
}

#[test]
fn only_the_expected_version_is_read_and_replaced() {
    let bucket = in_memory("versions");
    let first = put(&bucket, b"first", None).unwrap();
    let second = put(&bucket, b"second", Some(&first)).unwrap();
    assert!(with(|interrupt| bucket.get("mem", WHOLE, Some(&first), interrupt)).unwrap_err().is_corrupt());
    assert_eq!(with(|interrupt| bucket.get("mem", WHOLE, Some(&second), interrupt)).unwrap().bytes, &b"second"[..]);
    assert!(put(&bucket, b"third", Some(&first)).unwrap_err().is_state());
    // An earlier attempt that succeeded is a success.
    assert_eq!(put(&bucket, b"second", Some(&first)).unwrap(), second);
}

#[test]
fn of_two_creations_one_wins() {
    let bucket = in_memory("creations");
    assert_eq!(create(&bucket, b"mine").unwrap(), Created::New);
    assert_eq!(create(&bucket, b"mine").unwrap(), Created::Same);
    assert_eq!(create(&bucket, b"yours").unwrap(), Created::Other(Some(Bytes::from_static(b"mine"))));
}

#[test]
fn parts_come_in_any_order() {
    let bucket = in_memory("parts");
    let objects = bucket.objects().unwrap();
    let done = runtime::run(
        async move {
            let upload = objects.begin_upload("mem", Attributes::new()).await?;
            let second = objects.put_part(&upload, 1, Bytes::from_static(b"second").into()).await?;
            let first = objects.put_part(&upload, 0, Bytes::from_static(b"first ").into()).await?;
            assert!(objects.head("mem").await?.is_none());
            objects.complete_upload(&upload, vec![first, second], 12).await?;
            // As after a lost answer: the store does not know the upload any more.
            let abandoned = objects.begin_upload("other", Attributes::new()).await?;
            objects.abort_upload(&abandoned).await
        },
        &mut Interrupt::new(&mut || Ok(())),
    );
    done.unwrap();
    assert_eq!(get(&bucket, WHOLE).unwrap().bytes, &b"first second"[..]);
}

#[test]
fn a_name_that_a_store_changes_is_refused() {
    let long = "x".repeat(1024);
    let azure = [("skip_signature", "true"), ("account_name", "a")];
    for (place, options, names) in [
        ("s3://bucket/vm1", &azure[..1], &["", "a/", "a//b", "../x", "a\nb", "a\u{85}b", "\u{7f}", &long][..]),
        ("az://container/vm1", &azure, &["a.", "a./b", "a\\b"]),
    ] {
        let storage_options = options.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let options = RemoteOptions { storage_options, ..RemoteOptions::default() };
        let objects = Bucket::new(url(place), options).unwrap().objects().unwrap();
        for name in names {
            assert!(objects.check_name(name).unwrap_err().is_invalid_argument(), "{name:?}");
        }
        for name in ["a b", "100%", "é", "a+b", "~", "a/.b"] {
            objects.check_name(name).unwrap();
        }
    }
}

#[test]
fn a_range_must_be_the_one_that_was_asked_for() {
    for reply in [
        Reply::object(b"0123456789"),
        Reply::object(b"234"),
        Reply::part("bytes 3-5/10", b"345"),
        Reply::part("bytes 2-5/10", b"2345"),
        Reply::part("nonsense", b"234"),
        Reply::part("bytes 2-4/10", b"234").with("Content-Range", "bytes 2-18446744073709551615/10"),
    ] {
        let bucket = Server::start(move |_, _| reply.clone()).bucket();
        let error = get(&bucket, Wanted::Range(2..5)).unwrap_err();
        assert!(error.is_corrupt() && error.to_string().contains("ignores ranges"), "{error}");
    }
    let server = Server::start(|_, _| Reply::part("bytes 2-4/10", b"234"));
    assert_eq!(get(&server.bucket(), Wanted::Range(2..5)).unwrap().bytes, &b"234"[..]);
    let request = &server.requests()[0];
    assert_eq!((&*request.method, &*request.target), ("GET", "/bucket/vm1/mem"));
    assert_eq!(request.header("range"), Some("bytes=2-4"));
}

#[test]
fn an_object_that_is_shorter_than_the_range_is_corrupt() {
    let shorter = Server::start(|_, _| Reply::part("bytes 2-3/4", b"23")).bucket();
    let error = get(&shorter, Wanted::Range(2..5)).unwrap_err();
    assert!(error.is_corrupt() && error.to_string().contains("only 4 bytes"), "{error}");
    let empty = Server::start(|_, _| Reply::error(416, "InvalidRange", "")).bucket();
    assert!(get(&empty, Wanted::Range(2..5)).unwrap_err().is_corrupt());
}

#[test]
fn a_body_that_breaks_off_is_continued() {
    let server = Server::start(|number, _| match number {
        0 => Reply::part("bytes 0-5/6", b"012").with("Content-Length", "6"),
        _ => Reply::part("bytes 3-5/6", b"345"),
    });
    assert_eq!(get(&server.bucket(), Wanted::Range(0..6)).unwrap().bytes, &b"012345"[..]);
    assert_eq!(server.requests()[1].header("range"), Some("bytes=3-5"));
    let never = Server::start(|_, _| Reply::part("bytes 0-5/6", b"").with("Content-Length", "6"));
    let error = get(&never.bucket(), Wanted::Range(0..6)).unwrap_err();
    assert!(error.is_transient() && error.is_io(), "{error}");
}

#[test]
fn an_object_that_was_replaced_is_corrupt() {
    let version = Version { etag: Some("\"0\"".to_owned()), ..Version::default() };
    let ignores = Server::start(|_, _| Reply::object(b"other"));
    let refuses = Server::start(|_, _| Reply::error(412, "PreconditionFailed", ""));
    for server in [ignores, refuses] {
        let error = with(|interrupt| server.bucket().get("mem", WHOLE, Some(&version), interrupt)).unwrap_err();
        assert!(error.is_corrupt() && error.to_string().contains("replaced"), "{error}");
        assert_eq!(server.requests()[0].header("if-match"), Some("\"0\""));
    }
}

#[test]
fn another_region_is_told_with_the_right_one() {
    let xml = "<Region>us-west-2</Region>";
    for reply in [
        Reply::error(301, "PermanentRedirect", "").with("x-amz-bucket-region", "us-west-2"),
        Reply::error(400, "AuthorizationHeaderMalformed", xml),
    ] {
        let server = Server::start(move |_, _| reply.clone());
        let error = get(&server.bucket(), WHOLE).unwrap_err();
        assert!(error.is_invalid_argument() && error.to_string().contains("AWS_REGION=us-west-2"), "{error}");
        assert_eq!(server.requests().len(), 1);
    }
    let bare = Server::start(|_, _| Reply::status(301)).bucket();
    assert!(get(&bare, WHOLE).unwrap_err().to_string().contains("eu-west-1"));
}

#[test]
fn a_refusal_names_what_was_looked_at() {
    for (status, code, text) in [
        (403, "AccessDenied", "AWS_ACCESS_KEY_ID"),
        (403, "InvalidAccessKeyId", "export-credentials"),
        (401, "Unauthorized", "AWS_ACCESS_KEY_ID"),
        (404, "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
        (400, "InvalidToken", "AWS_SESSION_TOKEN"),
        (400, "ExpiredToken", "expired"),
    ] {
        let bucket = Server::start(move |_, _| Reply::error(status, code, "")).bucket();
        let error = get(&bucket, WHOLE).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EACCES), "{error}");
        assert!(error.to_string().contains(text) && error.to_string().contains(code), "{error}");
        assert!(!error.is_transient() && !error.to_string().contains("of the test"), "{error}");
    }
}

#[test]
fn an_absent_bucket_is_not_an_absent_object() {
    let bucket = Server::start(|_, _| Reply::error(404, "NoSuchBucket", "")).bucket();
    let mut found = with(|interrupt| bucket.get_many(&[("enc_metadata", WHOLE)], interrupt)).unwrap();
    let error = found.pop().unwrap().unwrap_err();
    assert!(error.is_not_found() && error.to_string().contains("no bucket bucket"), "{error}");
    let bucket = Server::start(|_, _| Reply::error(404, "NoSuchKey", "")).bucket();
    let mut found = with(|interrupt| bucket.get_many(&[("enc_metadata", WHOLE)], interrupt)).unwrap();
    assert!(found.pop().unwrap().unwrap().is_none());
}

#[test]
fn a_failure_of_the_server_is_repeated_and_then_told() {
    let server = Server::start(|number, _| match number {
        0 => Reply::error(500, "InternalError", ""),
        1 => Reply::error(503, "SlowDown", ""),
        2 => Reply::Close,
        _ => Reply::object(b"contents"),
    });
    assert_eq!(get(&server.bucket(), WHOLE).unwrap().bytes, &b"contents"[..]);
    let server = Server::start(|_, _| Reply::error(503, "SlowDown", ""));
    let error = get(&server.bucket(), WHOLE).unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("503 SlowDown"), "{error}");
    assert_eq!(server.requests().len(), 8);
    // The text of an error may be endless.
    let server = Server::start(|_, _| Reply::Answer(503, Vec::new(), vec![b'x'; 1 << 20]));
    assert!(get(&server.bucket(), WHOLE).unwrap_err().to_string().len() < 1000);
}

#[test]
fn a_server_that_is_not_there_is_a_transient_error() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = get(&bucket_at(&format!("http://{free}")), WHOLE).unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED), "{error}");
}

#[test]
fn what_exists_already_is_compared() {
    for (status, code) in [(409, "ConditionalRequestConflict"), (412, "PreconditionFailed"), (500, "InternalError")] {
        for (there, expected) in
            [(&b"mine"[..], Created::Same), (b"yours", Created::Other(Some(Bytes::from_static(b"yours"))))]
        {
            let server = Server::start(move |_, request| match &*request.method {
                "PUT" => Reply::error(status, code, ""),
                _ => Reply::object(there),
            });
            assert_eq!(create(&server.bucket(), b"mine").unwrap(), expected);
        }
    }
}

#[test]
fn a_conflict_that_leaves_nothing_is_tried_again() {
    let server = Server::start(|number, request| match (&*request.method, number) {
        ("PUT", 0..6) => Reply::error(409, "ConditionalRequestConflict", ""),
        ("PUT", _) => Reply::status(200).with("ETag", "\"1\""),
        _ => Reply::status(404),
    });
    assert_eq!(create(&server.bucket(), b"mine").unwrap(), Created::New);
    let puts = server.requests().into_iter().filter(|request| request.method == "PUT").collect::<Vec<_>>();
    assert_eq!(puts.len(), 4);
    assert!(puts.iter().all(|put| put.header("if-none-match") == Some("*") && put.body == b"mine"));
    let never = Server::start(|_, request| match &*request.method {
        "PUT" => Reply::error(409, "ConditionalRequestConflict", ""),
        _ => Reply::status(404),
    });
    let error = create(&never.bucket(), b"mine").unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("does not find it"), "{error}");
}

#[test]
fn a_lost_answer_of_a_creation_is_a_success() {
    let server = Server::start(|_, request| match &*request.method {
        "PUT" => Reply::Close,
        _ => Reply::object(b"mine"),
    });
    assert_eq!(create(&server.bucket(), b"mine").unwrap(), Created::Same);
}

#[test]
fn a_store_without_conditional_writes_is_refused() {
    let server = Server::start(|_, _| Reply::error(501, "NotImplemented", ""));
    let error = create(&server.bucket(), b"mine").unwrap_err();
    assert!(error.is_invalid_argument() && error.to_string().contains("conditional"), "{error}");
}

#[test]
fn a_lost_answer_of_a_completion_is_a_success() {
    let begun = b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>";
    let server = Server::start(|_, request| match &*request.method {
        "HEAD" => Reply::object(b"contents"),
        "POST" if request.target.ends_with("?uploads=") || request.target.ends_with("?uploads") => Reply::object(begun),
        _ => Reply::error(404, "NoSuchUpload", ""),
    });
    for (size, is_complete) in [(8, true), (9, false)] {
        let objects = server.bucket().objects().unwrap();
        let done = with(|interrupt| {
            let completing = async move {
                let upload = objects.begin_upload("mem", Attributes::new()).await?;
                objects.complete_upload(&upload, Vec::new(), size).await
            };
            runtime::run(completing, interrupt)
        });
        assert_eq!(done.is_ok(), is_complete);
    }
}

#[test]
fn a_caller_can_stop_a_request_that_hangs() {
    let bucket = Server::start(|_, _| Reply::Hang).bucket();
    let mut stop = || Err(Error::interrupted());
    assert!(bucket.get("mem", WHOLE, None, &mut Interrupt::new(&mut stop)).unwrap_err().is_interrupted());
    assert!(bucket.get_many(&[("mem", WHOLE)], &mut Interrupt::new(&mut stop)).unwrap_err().is_interrupted());
    assert!(bucket.list(&mut Interrupt::new(&mut stop)).unwrap_err().is_interrupted());
}

#[test]
fn a_bucket_is_shown_and_serialized_without_the_environment() {
    let bucket = bucket_at("http://127.0.0.1:1");
    let shown = format!("{bucket:?}");
    assert!(shown.contains("s3://bucket/vm1") && shown.contains("secret_access_key"), "{shown}");
    assert!(!shown.contains("of the test"), "{shown}");
    let text = serde_json::to_string(&bucket).unwrap();
    let again: Bucket = serde_json::from_str(&text).unwrap();
    assert_eq!((again.url(), again.options()), (bucket.url(), bucket.options()));
    assert!(serde_json::from_str::<Bucket>(&text.replace("s3://bucket", "s3://key@bucket")).is_err());
    let none = RemoteOptions { connections: 0, ..RemoteOptions::default() };
    assert!(Bucket::new(url("s3://bucket/vm1"), none).unwrap_err().is_invalid_argument());
}

#[test]
#[allow(unsafe_code, reason = "fork is in no safe crate")]
fn a_forked_process_connects_anew() {
    let server = Server::start(|_, _| Reply::object(b"contents"));
    let bucket = server.bucket();
    get(&bucket, WHOLE).unwrap();
    let (objects, task) = (bucket.objects().unwrap(), runtime::spawn(async { Ok(()) }).unwrap());
    // SAFETY: the child uses no lock that another thread of this test may hold, and ends without cleaning up.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: ends the child, should it hang.
        unsafe { libc::alarm(120) };
        let passed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let stale = with(|interrupt| runtime::run(async move { objects.get("mem", WHOLE, None).await }, interrupt));
            let begun_before = with(|interrupt| task.wait(interrupt));
            stale.unwrap_err().is_state()
                && begun_before.unwrap_err().is_state()
                && get(&bucket, WHOLE).unwrap().bytes == b"contents"[..]
        }));
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::from(!passed.unwrap_or(false))) };
    }
    let mut status = -1;
    // SAFETY: the process is a child of this one, and the status is written to a variable.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0);
    assert_eq!(get(&bucket, WHOLE).unwrap().bytes, &b"contents"[..]);
}
