//! The claim on a prefix: an object that is there while a snapshot is being written.
//!
//! Of two writers, one creates it. It is not a lock: a killed process leaves it behind, and then the next writer resumes
//! the push, takes the prefix over, or `clean` removes everything. A writer checks before its last step that the claim
//! is still its own.

use std::time::SystemTime;

use bytes::Bytes;
use object_store::Attributes;
use serde::{Deserialize, Deserializer, Serialize};

use super::{Bucket, Created, Version, Wanted};
use crate::cipher::fill_random;
use crate::error::{Error, Kind, Result};
use crate::name::shown;
use crate::strict_cbor::{Schema, byte_string};
use crate::threads::Interrupt;

/// The name of the claim. It is reserved for vmsnap, so readers and lists ignore it.
pub(crate) const CLAIM: &str = ".vmsnap-push";

/// A larger object is not a claim.
const MAX_CLAIM_BYTES: u64 = 64 << 10;

const SCHEMA: Schema =
    Schema { name: "claim", format: "vmsnap-push", version: 1, malformed: "the claim of another writer is malformed" };

/// The attempts to get a claim that changes at the same time.
const ATTEMPTS: usize = 3;

/// A claim that this process has.
pub(crate) struct Claim {
    bytes: Bytes,
    manifest_digest: Option<[u8; 32]>,
}

/// How a claim was got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// Nobody had it.
    New,
    /// An earlier push of the same snapshot had it.
    Resumed,
    /// Another writer had it.
    Replaced,
}

#[derive(Serialize)]
struct Fields<'a> {
    format: &'static str,
    version: u64,
    requires: [&'static str; 0],
    /// Of the stored manifest; absent if that is not known yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    manifest_blake3: Option<&'a serde_bytes::Bytes>,
    /// Random: two claims are never equal.
    claim_id: &'a serde_bytes::Bytes,
    started: &'a str,
    generator: &'a str,
    /// The host and the process.
    writer: &'a str,
}

#[derive(Deserialize)]
struct Body {
    #[serde(default, deserialize_with = "some_digest")]
    manifest_blake3: Option<[u8; 32]>,
    started: String,
    generator: String,
    writer: String,
}

fn some_digest<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<[u8; 32]>, D::Error> {
    byte_string(deserializer).map(Some)
}

impl Claim {
    fn new(manifest_digest: Option<[u8; 32]>) -> Result<Self> {
        let mut claim_id = [0; 16];
        fill_random(&mut claim_id)?;
        let host = rustix::system::uname();
        let writer = format!("process {} on {}", std::process::id(), host.nodename().to_string_lossy());
        let fields = Fields {
            format: SCHEMA.format,
            version: SCHEMA.version,
            requires: [],
            manifest_blake3: manifest_digest.as_ref().map(|digest| serde_bytes::Bytes::new(digest)),
            claim_id: serde_bytes::Bytes::new(&claim_id),
            started: &humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            generator: concat!("vmsnap ", env!("CARGO_PKG_VERSION")),
            writer: &writer,
        };
        let mut bytes = Vec::new();
        ciborium::into_writer(&fields, &mut bytes)
            .map_err(|error| Error::with_source(Kind::Serialization, "the claim cannot be written", error))?;
        Ok(Self { bytes: bytes.into(), manifest_digest })
    }

    /// Claims the prefix of `bucket`. A push gives the digest of its stored manifest, and then resumes an earlier push of
    /// the same snapshot. With `take_over`, the claim of any other writer is replaced.
    ///
    /// # Errors
    ///
    /// `State` if another writer has the claim: whose it is, and since when.
    pub(crate) fn take(
        bucket: &Bucket,
        manifest_digest: Option<[u8; 32]>,
        take_over: bool,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<(Self, Taken)> {
        let claim = Self::new(manifest_digest)?;
        for _ in 0..ATTEMPTS {
            match bucket.create(CLAIM, claim.bytes.clone(), interrupt)? {
                Created::New | Created::Same => return Ok((claim, Taken::New)),
                Created::Other(_) => {}
            }
            let Some((version, body)) = look(bucket, interrupt)? else { continue };
            let is_same = body
                .as_ref()
                .is_ok_and(|body| body.manifest_blake3.is_some() && body.manifest_blake3 == manifest_digest);
            if !is_same && !take_over {
                return Err(held(body));
            }
            bucket.put(CLAIM, claim.bytes.clone(), Attributes::new(), version.as_ref(), interrupt)?;
            return Ok((claim, if is_same { Taken::Resumed } else { Taken::Replaced }));
        }
        Err(Error::new(Kind::State, format!("{CLAIM} appears and disappears: other writers use the prefix; try again")))
    }

    /// Checks that nobody has claimed the prefix.
    ///
    /// # Errors
    ///
    /// `State` if another writer has the claim: whose it is, and since when.
    pub(super) fn check_absent(bucket: &Bucket, interrupt: &mut Interrupt<'_>) -> Result<()> {
        look(bucket, interrupt)?.map_or(Ok(()), |(_, body)| Err(held(body)))
    }

    /// Checks that no other writer has taken the claim over.
    ///
    /// # Errors
    ///
    /// `State` if it is another one or gone.
    pub(crate) fn check(&self, bucket: &Bucket, interrupt: &mut Interrupt<'_>) -> Result<()> {
        if self.is_held(bucket, interrupt)? {
            return Ok(());
        }
        let text = format!("another process has removed or taken over {CLAIM} meanwhile: the snapshot is not complete");
        Err(Error::new(Kind::State, text))
    }

    /// Whether the claim is still there. A claim of another push of the same snapshot counts.
    pub(crate) fn is_held(&self, bucket: &Bucket, interrupt: &mut Interrupt<'_>) -> Result<bool> {
        let wanted = [(CLAIM, Wanted::Whole { max_bytes: MAX_CLAIM_BYTES })];
        let found = match bucket.get_many(&wanted, interrupt)?.pop().unwrap_or(Ok(None)) {
            Ok(found) => found,
            Err(error) if error.is_corrupt() => None,
            Err(error) => return Err(error),
        };
        Ok(found.is_some_and(|found| {
            let of_same_push = || {
                let body = SCHEMA.decode::<Body>(&found.bytes);
                body.is_ok_and(|body| body.manifest_blake3.is_some() && body.manifest_blake3 == self.manifest_digest)
            };
            found.bytes == self.bytes || of_same_push()
        }))
    }

    /// Removes the claim of a push that was killed after its last object, if it pushed this snapshot.
    pub(crate) fn release_of_push(
        bucket: &Bucket,
        manifest_digest: [u8; 32],
        interrupt: &mut Interrupt<'_>,
    ) -> Result<()> {
        let claim = Self { bytes: Bytes::new(), manifest_digest: Some(manifest_digest) };
        if claim.is_held(bucket, interrupt)? { Claim::release(bucket, interrupt) } else { Ok(()) }
    }

    /// Removes the claim. The caller has it.
    pub(crate) fn release(bucket: &Bucket, interrupt: &mut Interrupt<'_>) -> Result<()> {
        bucket.delete(&[CLAIM.to_owned()], interrupt)
    }
}

/// Reads the claim of another writer. Without its contents, it can only be taken over.
fn look(bucket: &Bucket, interrupt: &mut Interrupt<'_>) -> Result<Option<(Option<Version>, Result<Body>)>> {
    let wanted = [(CLAIM, Wanted::Whole { max_bytes: MAX_CLAIM_BYTES })];
    match bucket.get_many(&wanted, interrupt)?.pop().unwrap_or(Ok(None)) {
        Ok(None) => Ok(None),
        Ok(Some(found)) => Ok(Some((Some(found.version), SCHEMA.decode::<Body>(&found.bytes)))),
        Err(error) if error.is_corrupt() => Ok(Some((None, Err(error)))),
        Err(error) => Err(error),
    }
}

/// The error for a claim that another writer has.
fn held(body: Result<Body>) -> Error {
    const REMEDY: &str = "wait until it is done; if it was killed, repeat its push to resume it, take the place over \
                          (--take-over, take_over), or remove its remains (vmsnap clean)";
    let whose = match body {
        Ok(Body { manifest_blake3, started, generator, writer }) => {
            let doing = if manifest_blake3.is_some() { "pushes another snapshot" } else { "writes a snapshot" };
            let since = shown(&started);
            format!("{} {doing} there since {since}, with {}", shown(&writer), shown(&generator))
        }
        Err(error) => format!("another writer is at work ({error})"),
    };
    Error::new(Kind::State, format!("{whose}: {REMEDY}"))
}

#[cfg(test)]
mod tests {
    use super::super::settings::tests::url;
    use super::*;
    use crate::store::RemoteOptions;

    fn bucket(name: &str) -> Bucket {
        Bucket::new(url(&format!("memory://{name}/vm1")), RemoteOptions::default()).unwrap()
    }

    fn take(bucket: &Bucket, digest: Option<[u8; 32]>, take_over: bool) -> Result<(Claim, Taken)> {
        Claim::take(bucket, digest, take_over, &mut Interrupt::new(&mut || Ok(())))
    }

    fn is_held(bucket: &Bucket, claim: &Claim) -> bool {
        let checked = claim.check(bucket, &mut Interrupt::new(&mut || Ok(())));
        assert!(checked.as_ref().is_ok() || checked.as_ref().unwrap_err().is_state());
        checked.is_ok()
    }

    #[test]
    fn a_claim_says_whose_it_is_and_since_when() {
        let bucket = bucket("claims");
        let (first, taken) = take(&bucket, None, false).unwrap();
        assert_eq!(taken, Taken::New);
        assert!(first.bytes.len() < 300);
        for digest in [None, Some([1; 32])] {
            let error = take(&bucket, digest, false).err().unwrap();
            assert!(error.is_state(), "{error}");
            let text = error.to_string();
            let process = format!("process {} on ", std::process::id());
            for part in [&*process, "writes a snapshot", "since \"20", "vmsnap ", "--take-over", "vmsnap clean"] {
                assert!(text.contains(part), "{text}");
            }
        }
        assert!(is_held(&bucket, &first));
        Claim::release(&bucket, &mut Interrupt::new(&mut || Ok(()))).unwrap();
        assert!(!is_held(&bucket, &first));
        assert_eq!(take(&bucket, None, true).unwrap().1, Taken::New);
    }

    #[test]
    fn a_push_of_the_same_snapshot_resumes() {
        let bucket = bucket("resumed");
        let (first, _) = take(&bucket, Some([1; 32]), false).unwrap();
        assert!(take(&bucket, Some([2; 32]), false).err().unwrap().to_string().contains("another snapshot"));
        let (second, taken) = take(&bucket, Some([1; 32]), false).unwrap();
        assert_eq!(taken, Taken::Resumed);
        assert!(is_held(&bucket, &first) && is_held(&bucket, &second));
    }

    #[test]
    fn a_claim_that_was_taken_over_is_lost() {
        let bucket = bucket("taken over");
        let (first, _) = take(&bucket, None, false).unwrap();
        let (second, taken) = take(&bucket, Some([1; 32]), true).unwrap();
        assert_eq!(taken, Taken::Replaced);
        assert!(!is_held(&bucket, &first) && is_held(&bucket, &second));
    }

    #[test]
    fn something_else_of_the_name_is_only_taken_over() {
        for bytes in [b"text".to_vec(), Vec::new(), vec![0xa0; 100_000]] {
            let bucket = bucket(&format!("strange{}", bytes.len()));
            let interrupt = &mut || Ok(());
            let interrupt = &mut Interrupt::new(interrupt);
            bucket.create(CLAIM, bytes.into(), interrupt).unwrap();
            let error = take(&bucket, Some([1; 32]), false).err().unwrap();
            assert!(error.is_state() && error.to_string().contains("--take-over"), "{error}");
            assert_eq!(take(&bucket, Some([1; 32]), true).unwrap().1, Taken::Replaced);
        }
    }
}
