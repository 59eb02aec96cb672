//! Removal of the remains of killed writers in a bucket.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use super::Bucket;
use super::claim::CLAIM;
use super::objects::Listed;
use crate::error::Result;
use crate::name::{KEY_METADATA, MANIFEST};
use crate::threads::Interrupt;

/// The objects below a prefix that belong together.
#[derive(Default)]
struct Found<'a> {
    objects: Vec<&'a Listed>,
    has_claim: bool,
    has_manifest: bool,
}

/// Removes the remains of killed writers at the prefix of `bucket` and below it: where there is a claim and no manifest,
/// everything, and where there are both, the claim. Where anything was written within `age`, nothing is removed.
/// Returns the prefixes that were cleaned, and those that were left, relative to that of `bucket`.
pub(crate) fn clean(
    bucket: &Bucket,
    age: Duration,
    interrupt: &mut Interrupt<'_>,
) -> Result<(Vec<String>, Vec<String>)> {
    let listed = bucket.list(interrupt)?;
    // The clock of the store and this one may differ; an object from the future is a new one.
    let now = SystemTime::now();
    let (mut removed, mut held) = (Vec::new(), Vec::new());
    for (prefix, found) in snapshots(&listed) {
        if !found.has_claim {
            continue;
        }
        let is_old = |object: &&Listed| now.duration_since(object.modified).is_ok_and(|passed| passed >= age);
        if !found.objects.iter().all(is_old) {
            held.push(prefix.to_owned());
            continue;
        }
        let claim = join(prefix, CLAIM);
        if !found.has_manifest {
            let names: Vec<_> =
                found.objects.iter().map(|object| object.name.clone()).filter(|name| *name != claim).collect();
            bucket.delete(&names, interrupt)?;
        }
        // Last: if this is interrupted, it can be repeated.
        bucket.delete(&[claim], interrupt)?;
        removed.push(prefix.to_owned());
    }
    Ok((removed, held))
}

/// Finds the snapshots, complete or not. An object belongs to the nearest prefix above it that has a file of vmsnap.
fn snapshots(listed: &[Listed]) -> BTreeMap<&str, Found<'_>> {
    let mut snapshots: BTreeMap<&str, Found<'_>> = BTreeMap::new();
    for object in listed {
        let (prefix, name) = object.name.rsplit_once('/').unwrap_or(("", &object.name));
        if matches!(name, CLAIM | MANIFEST | KEY_METADATA) {
            let found = snapshots.entry(prefix).or_default();
            found.has_claim |= name == CLAIM;
            found.has_manifest |= name == MANIFEST;
        }
    }
    for object in listed {
        let mut prefix = object.name.as_str();
        while !prefix.is_empty() {
            prefix = prefix.rsplit_once('/').map_or("", |(above, _)| above);
            if let Some(found) = snapshots.get_mut(prefix) {
                found.objects.push(object);
                break;
            }
        }
    }
    snapshots
}

fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") }
}
