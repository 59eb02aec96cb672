//! Archives written by the layout, and read by the crate `tar` and by GNU tar.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::process::Command;

use super::super::member::global_header;
use super::*;
use crate::manifest::{Entry, Proof};

const MTIME: u64 = 1_769_601_600;
const GIB: u64 = 1 << 30;

fn manifest(encrypted: bool, namespaces: &[&str], fragments: &[(&str, u64)]) -> Manifest {
    let entry = |stored_size| Entry { size: stored_size, stored_size, proof: Proof::Blake3([5; 32]) };
    let mut manifest = Manifest::new(
        [7; 16],
        encrypted,
        namespaces.iter().map(|path| (*path).into()).collect(),
        fragments.iter().map(|(path, size)| ((*path).to_owned(), entry(*size))).collect(),
    );
    "2026-01-28T12:00:00.75Z".clone_into(&mut manifest.created);
    manifest
}

/// Different data for each member. Only the beginning of a large one is written; the rest is a hole.
fn data_of(member: &Member<'_>) -> Vec<u8> {
    let length = usize::try_from(member.size.min(200_000)).unwrap();
    member.path.bytes().chain(*b"| vmsnap |").cycle().take(length).collect()
}

fn write(layout: &Layout) -> tempfile::NamedTempFile {
    let file = tempfile::Builder::new().suffix(".vmsnap.tar").tempfile().unwrap();
    let write_at = |bytes: &[u8], offset| file.as_file().write_all_at(bytes, offset).unwrap();
    write_at(&global_header(), 0);
    for member in layout.members() {
        write_at(&member.headers(), member.start);
        write_at(&data_of(&member), member.data().start);
    }
    file.as_file().set_len(layout.total_bytes()).unwrap();
    file
}

/// Snapshots of every kind: empty, plain, encrypted, with long names, with large fragments.
fn layouts() -> Vec<Layout> {
    let deep = ["d".repeat(99), "e".repeat(100), "f".repeat(101), "é".to_owned()].join("/");
    let namespaces: Vec<&str> =
        deep.match_indices('/').map(|(end, _)| &deep[..end]).chain([&*deep, "ns", "ns/deep", "ns-c"]).collect();
    let long =
        [format!("{deep}/{}", "x".repeat(255)), "l".repeat(100), "m".repeat(101), format!("ns/{}", "ü".repeat(45))];
    let mut fragments = vec![
        ("vmsnap", 3),
        ("cpu 0", 0),
        ("ns/b", 512),
        ("small", 65_535),
        ("large", 65_536),
        ("a-large", 100_000),
        ("ns/deep/=1\n 5 path=x", 513),
        ("zz", 1),
    ];
    fragments.extend(long.iter().zip([70_000, 1, 70_001, 2]).map(|(path, size)| (&**path, size)));
    let mut huge = fragments.clone();
    huge.extend([("mem_data", 9 * GIB), ("ns/é", 8 * GIB), ("mem_data2", 8 * GIB - 1)]);
    [(None, &[][..], &[][..]), (None, &namespaces, &fragments), (Some(613), &namespaces, &fragments)]
        .into_iter()
        .chain([(Some(100_000), &namespaces[..], &huge[..]), (None, &namespaces, &huge)])
        .map(|(key, namespaces, fragments)| {
            Layout::new(&manifest(key.is_some(), namespaces, fragments), key, 1234).unwrap()
        })
        .collect()
}

#[test]
fn members_are_in_the_order_of_the_format_without_gaps() {
    for layout in layouts() {
        let members: Vec<_> = layout.members().collect();
        let mut end = 1024;
        for member in &members {
            assert_eq!(member.start, end);
            assert_eq!(Member::parse(member.start, &member.headers()).unwrap(), *member);
            end = member.end();
        }
        assert_eq!(layout.total_bytes(), end + 1024);
        let own = usize::from(layout.key_metadata().is_some()) + 1;
        assert_eq!(layout.manifest(), members[own - 1]);
        assert!(layout.key_metadata().is_none_or(|member| member == members[0] && member.path == KEY_METADATA));
        assert_eq!(layout.manifest().path, MANIFEST);
        let order = |member: &Member<'_>| {
            let rank = match (member.kind, member.path) {
                (_, "enc_metadata") => 0,
                (_, "vmsnap_manifest") => 1,
                (MemberKind::Namespace, _) => 2,
                _ => 3 + i32::from(member.size >= 65_536),
            };
            (rank, member.path.to_owned())
        };
        assert!(members.windows(2).all(|two| order(&two[0]) < order(&two[1]) && two[0].order() < two[1].order()));
    }
    let starts: Vec<_> = layouts().iter().map(|layout| layout.manifest().data().start).collect();
    assert_eq!(starts, [65_536, 65_536, 65_536, 2 * 65_536, 65_536]);
}

#[test]
fn fragments_are_found_by_their_path_and_nothing_else_is() {
    for layout in layouts() {
        for member in layout.members() {
            let is_fragment = member.kind == MemberKind::File && ![KEY_METADATA, MANIFEST].contains(&member.path);
            assert_eq!(layout.fragment(member.path), is_fragment.then_some(member));
            assert_eq!(layout.fragment(&format!("{}0", member.path)), None);
        }
        assert_eq!(layout.fragment(""), None);
        assert_eq!(layout.fragment("\u{10ffff}"), None);
    }
}

#[test]
fn the_crate_tar_reads_every_member() {
    for layout in layouts() {
        let file = write(&layout);
        let mut archive = tar::Archive::new(File::open(file.path()).unwrap());
        let mut members = layout.members();
        for entry in archive.entries_with_seek().unwrap() {
            let mut entry = entry.unwrap();
            if entry.header().entry_type() == tar::EntryType::XGlobalHeader {
                continue;
            }
            let member = members.next().unwrap();
            let slash = if member.kind == MemberKind::Namespace { "/" } else { "" };
            assert_eq!(&*entry.path_bytes(), format!("{}{slash}", member.path).as_bytes());
            assert_eq!(entry.header().entry_type().is_dir(), member.kind == MemberKind::Namespace);
            assert_eq!(entry.header().mode().unwrap(), if slash.is_empty() { 0o600 } else { 0o700 });
            assert_eq!(entry.header().mtime().unwrap(), MTIME);
            assert_eq!(entry.size(), member.size);
            assert_eq!(entry.raw_file_position(), member.data().start);
            let mut data = Vec::new();
            entry.by_ref().take(200_000).read_to_end(&mut data).unwrap();
            assert!(data == data_of(&member), "{}", member.path);
        }
        assert!(members.next().is_none());
    }
}

/// GNU tar lists an archive with holes without reading them.
#[test]
fn gnu_tar_lists_every_member_and_unpacks_them() {
    let version = Command::new("tar").arg("--version").output().map(|output| output.stdout).unwrap_or_default();
    if !version.starts_with(b"tar (GNU tar)") {
        assert!(std::env::var("VMSNAP_REQUIRE_ALL").as_deref() != Ok("1"), "no GNU tar");
        eprintln!("skipped: no GNU tar");
        return;
    }
    let tar = |arguments: &[&str]| {
        let output = Command::new("tar").args(arguments).env("LC_ALL", "C.UTF-8").output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    for layout in layouts() {
        let file = write(&layout);
        let path = file.path().to_str().unwrap();
        let expected: Vec<_> = layout
            .members()
            .map(|member| {
                member.path.replace('\n', "\\n") + if member.kind == MemberKind::Namespace { "/" } else { "" }
            })
            .collect();
        assert_eq!(tar(&["--list", "--quoting-style=escape", "-f", path]).lines().collect::<Vec<_>>(), expected);
        if layout.total_bytes() > GIB {
            continue;
        }
        let folder = tempfile::tempdir().unwrap();
        tar(&["--extract", "-f", path, "-C", folder.path().to_str().unwrap()]);
        for member in layout.members() {
            let path = folder.path().join(member.path);
            let metadata = path.metadata().unwrap();
            assert_eq!(metadata.is_dir(), member.kind == MemberKind::Namespace);
            // Not of a namespace: GNU tar sets its time before it unpacks the fragments, which change it.
            if member.kind == MemberKind::File {
                let since = metadata.modified().unwrap().duration_since(UNIX_EPOCH).unwrap();
                assert_eq!(since.as_secs(), MTIME);
                assert!(std::fs::read(&path).unwrap() == data_of(&member), "{}", member.path);
            }
        }
    }
}

#[test]
fn sizes_that_no_file_can_have_are_corrupt() {
    for sizes in [vec![u64::MAX], vec![1 << 63], vec![1 << 62; 2], vec![1 << 60; 9], vec![u64::MAX - 600; 3]] {
        let names: Vec<_> = (0..sizes.len()).map(|number| format!("f{number}")).collect();
        let fragments: Vec<_> = names.iter().map(String::as_str).zip(sizes).collect();
        let error = Layout::new(&manifest(false, &[], &fragments), None, 1).err().unwrap();
        assert!(error.is_corrupt(), "{error}");
    }
    assert!(Layout::new(&manifest(true, &[], &[]), Some(u64::MAX), 1).err().unwrap().is_corrupt());
    assert!(Layout::new(&manifest(true, &[], &[]), Some(1), u64::MAX).err().unwrap().is_corrupt());
}

#[test]
fn the_manifest_and_the_key_metadata_agree() {
    for (encrypted, key_metadata) in [(true, None), (false, Some(100))] {
        let error = Layout::new(&manifest(encrypted, &[], &[]), key_metadata, 1).err().unwrap();
        assert!(error.is_corrupt() && error.to_string().contains("enc_metadata"), "{error}");
    }
}

#[test]
fn a_path_that_is_too_long_is_refused_by_its_beginning() {
    let path = "x/".repeat(1 << 20) + "x";
    let error = Layout::new(&manifest(false, &[], &[(&path, 1)]), None, 1).err().unwrap();
    assert!(error.is_unsupported_format() && error.to_string().len() < 500, "{error}");
}

#[test]
fn the_time_is_that_of_the_manifest_in_whole_seconds() {
    for (created, expected) in [
        ("2026-01-28T12:00:00Z", MTIME),
        ("2026-01-28T12:00:00.999999999999Z", MTIME),
        ("1970-01-01T00:00:00Z", 0),
        ("2242-03-16T12:56:31Z", MAX_MTIME),
        ("2242-03-16T12:56:32Z", MAX_MTIME),
        ("9999-12-31T23:59:59Z", MAX_MTIME),
    ] {
        assert_eq!(mtime_of(created).unwrap(), expected, "{created}");
    }
    assert!(mtime_of("yesterday").unwrap_err().is_corrupt());
}

#[test]
fn many_members_take_little_memory() {
    const COUNT: u32 = 100_000;
    let names: Vec<_> = (0..COUNT).map(|number| format!("ns/fragment {number:06}")).collect();
    let sizes = (0..COUNT).map(|number| u64::from(number) * 977 % 131_072);
    let manifest = manifest(false, &["ns"], &names.iter().map(String::as_str).zip(sizes.clone()).collect::<Vec<_>>());
    let layout = Layout::new(&manifest, None, 1234).unwrap();
    assert_eq!(size_of::<Place>(), 24);
    assert_eq!(layout.places.capacity(), layout.places.len() + 1); // room for enc_metadata
    let found: BTreeMap<_, _> =
        names.iter().map(|path| layout.fragment(path).unwrap()).map(|member| (member.start, member.size)).collect();
    assert_eq!(found.len(), names.len());
    assert!(names.iter().zip(sizes).all(|(path, size)| layout.fragment(path).unwrap().size == size));
}
