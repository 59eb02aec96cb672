//! The headers against a second computation, and against an independent implementation of tar.

use proptest::prelude::*;

use super::*;

const MTIME: u64 = 1_769_601_600;
const GIB: u64 = 1 << 30;

fn file(path: &str, size: u64, start: u64) -> Member<'_> {
    Member::new(path, MemberKind::File, size, MTIME, start).unwrap()
}

fn namespace(path: &str, start: u64) -> Member<'_> {
    Member::new(path, MemberKind::Namespace, 0, MTIME, start).unwrap()
}

/// The records of pax data, each of which must have the least possible length; a value of spaces is shown as its end.
fn records(mut data: &[u8]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    while !data.is_empty() {
        let space = data.iter().position(|byte| *byte == b' ').unwrap();
        let digits = str::from_utf8(&data[..space]).unwrap();
        let (record, rest) = data.split_at(digits.parse().unwrap());
        assert!(!digits.starts_with('0'));
        let text = str::from_utf8(&record[space + 1..]).unwrap().strip_suffix('\n').unwrap();
        let (keyword, value) = text.split_once('=').unwrap();
        let with_fewer_digits = record.len() - 1;
        if keyword != "comment" {
            assert!(with_fewer_digits.to_string().len() == digits.len(), "{digits} is not the least length");
        }
        found.push((keyword.to_owned(), value.to_owned()));
        data = rest;
    }
    found
}

/// The pseudocode of `docs/format.md`, line by line.
fn pax_bytes_of_the_format(pos: i128, need: i128, alignment: i128) -> Option<i128> {
    if need == 0 && (pos + 512) % alignment == 0 {
        return None;
    }
    let mut p = i128::max(512, (need + 511) / 512 * 512);
    p += (-(pos + 1024 + p)).rem_euclid(alignment);
    while 0 < p - need && p - need < 20 {
        p += i128::max(alignment, 512);
    }
    Some(p)
}

/// Checks one member in every way.
fn check(member: Member<'_>) {
    let headers = member.headers();
    assert_eq!(headers.len(), member.headers_bytes(), "{member:?}");
    assert_eq!(headers_bytes_from(member.start, headers.first_chunk().unwrap()).unwrap(), Some(headers.len()));
    assert_eq!(Member::parse(member.start, &headers).unwrap(), member);
    let alignment = match member.path {
        "vmsnap_manifest" => 65_536,
        "enc_metadata" => 512,
        _ if member.size >= 65_536 => 4096,
        _ => 512,
    };
    assert_eq!(member.data().start % alignment, 0);
    assert_eq!(member.end() % 512, 0);

    let name = if member.kind == MemberKind::Namespace { format!("{}/", member.path) } else { member.path.to_owned() };
    let in_pax = name.len() > 100 || name.bytes().any(|byte| byte > 0x7f);
    let mut expected = Vec::new();
    expected.extend(in_pax.then(|| ("path", name.clone())));
    expected.extend((member.size >= 8 * GIB).then(|| ("size", member.size.to_string())));
    let bytes_of = |(keyword, value): &(&str, String)| {
        let length = |digits: usize| digits + 1 + keyword.len() + 1 + value.len() + 1;
        (1..9).find(|digits| length(*digits).to_string().len() == *digits).map(length).unwrap()
    };
    let need: usize = expected.iter().map(bytes_of).sum();
    let pax = pax_bytes_of_the_format(member.start.into(), i128::try_from(need).unwrap(), alignment.into());
    assert_eq!(member.pax_bytes().map(|bytes| i128::try_from(bytes).unwrap()), pax, "{member:?}");

    let (rest, block) = headers.split_last_chunk::<512>().unwrap();
    if !rest.is_empty() {
        let found = records(&rest[512..]);
        let (needed, comment) = found.split_at(expected.len());
        assert!(needed.iter().map(|(keyword, value)| (&**keyword, value)).eq(expected.iter().map(|(k, v)| (*k, v))));
        assert_eq!(comment.len(), usize::from(rest.len() - 512 > need));
        assert!(comment.iter().all(|(keyword, value)| keyword == "comment" && value.bytes().all(|byte| byte == b' ')));
    }
    // The crate `tar` reads the same values from the ustar header alone.
    let ustar = tar::Header::from_byte_slice(block);
    assert_eq!(ustar.entry_size().unwrap(), member.size);
    assert_eq!(ustar.mtime().unwrap(), member.mtime);
    assert_eq!(&*ustar.path_bytes(), if in_pax { b"vmsnap".as_slice() } else { name.as_bytes() });
    let sum: u32 = block[..148].iter().chain(b"        ").chain(&block[156..]).map(|byte| u32::from(*byte)).sum();
    assert_eq!(ustar.cksum().unwrap(), sum);
}

#[test]
fn the_global_header_is_that_of_the_format() {
    let blocks = global_header();
    assert_eq!(records(&blocks[512..]), [("comment".into(), format!("{:<499}", "vmsnap archive 1"))]);
    let fields = [
        (0, &b"pax_global_header\0"[..]),
        (100, b"0000600\x000000000\x000000000\x0000000001000\x0000000000000\0"),
        (154, b"\0 g\0"),
        (257, b"ustar\x0000\0"),
        (329, b"0000000\x000000000\0"),
    ];
    for (offset, field) in fields {
        assert_eq!(&blocks[offset..offset + field.len()], field);
    }
    let sum: u32 = blocks[..148].iter().chain(b"        ").chain(&blocks[156..512]).map(|byte| u32::from(*byte)).sum();
    assert_eq!(&blocks[148..154], format!("{sum:06o}").as_bytes());
}

#[test]
fn short_members_have_a_single_header() {
    for member in [file("cpu", 10, 1024), namespace("disks", 1024), file("mem", 65_536, 4096 - 512)] {
        check(member);
        assert_eq!(member.headers_bytes(), 512);
    }
}

#[test]
fn the_manifest_begins_at_65536() {
    for start in [1024, 1536, 2048, 65_536 - 1024, 65_536 - 512, 65_536, 65_536 + 512] {
        let manifest = file(MANIFEST, 100, start);
        check(manifest);
        assert_eq!(manifest.headers_bytes() == 512, start == 65_536 - 512);
    }
    assert_eq!(file(MANIFEST, 100, 1024).data().start, 65_536);
    assert_eq!(file(KEY_METADATA, 100_000, 1024).data().start, 1536);
}

/// Every length of a path around the lengths at which something changes: the name field, the digits of the record, and
/// the room that remains for the comment.
#[test]
fn paths_of_every_length_are_described_exactly() {
    let lengths = (1..140).chain(470..530).chain(980..1040).chain(9970..10_010).chain([100_000, MAX_PATH_BYTES]);
    for length in lengths {
        let ascii: String = (0..length).map(|at| if at % 200 == 199 && at + 1 < length { '/' } else { 'a' }).collect();
        let other = if length > 2 { format!("é{}", &ascii[2..]) } else { "é".to_owned() };
        for path in [&*ascii, &*other] {
            for start in [1024, 4096, 65_536 - 512] {
                check(namespace(path, start));
                for size in [0, 511, 65_535, 65_536, 8 * GIB - 1, 8 * GIB] {
                    check(file(path, size, start));
                }
            }
        }
    }
}

#[test]
fn the_field_of_the_name_has_100_bytes_of_ascii() {
    let path = "x".repeat(100);
    let is_short = |member: Member<'_>| member.headers_bytes() == 512;
    assert!(is_short(file(&path, 1, 1024)) && is_short(namespace(&path[1..], 1024)));
    assert!(!is_short(namespace(&path, 1024)) && !is_short(file("é", 1, 1024)));
    assert!(!is_short(file(&"x".repeat(101), 1, 1024)));
}

#[test]
fn sizes_from_8_gib_on_are_in_both_headers() {
    for size in [8 * GIB - 1, 8 * GIB, 9 * GIB, 1 << 62] {
        check(file("mem_data", size, 4096));
        let headers = file("mem_data", size, 4096).headers();
        let field = &headers[headers.len() - 512 + 124..][..12];
        let expected =
            if size < 8 * GIB { b"77777777777\0".to_vec() } else { u128::from(size).to_be_bytes()[4..].into() };
        assert_eq!(field[1..], expected[1..]);
        assert_eq!(field[0], if size < 8 * GIB { b'7' } else { 0x80 });
    }
}

#[test]
fn members_beyond_the_limits_are_refused() {
    let new = |path: &str, size, start| Member::new(path, MemberKind::File, size, MTIME, start).map(drop);
    for (size, start) in [(u64::MAX, 1024), (1 << 63, 1024), (0, u64::MAX), (1 << 62, 1 << 62), (u64::MAX, u64::MAX)] {
        assert!(new("x", size, start).unwrap_err().is_corrupt());
    }
    let path = "x/".repeat(MAX_PATH_BYTES / 2) + "x";
    assert!(new(&path, 0, 1024).unwrap_err().is_unsupported_format());
    // The longest headers of all are those that a reader accepts.
    let longest = file(&path[..MAX_PATH_BYTES - 1], 1 << 62, 1024).headers();
    assert!(longest.len() <= 2 * 512 + MAX_PAX_BYTES);
}

#[test]
fn a_pax_header_without_bounds_is_refused_before_it_is_read() {
    let mut block = ustar(PAX, "vmsnap.pax", 512, MTIME);
    assert_eq!(headers_bytes_from(0, &block).unwrap(), Some(1536));
    for size in
        [b"00000000777\0", b"00010000000\0", b"77777777777\0", b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\0", &[0xff; 12]]
    {
        put(&mut block, 124, size);
        assert!(headers_bytes_from(0, &block).unwrap_err().is_corrupt());
    }
    assert_eq!(headers_bytes_from(0, &[0; 512]).unwrap(), None);
}

/// Every changed byte either makes the headers invalid or describes another member exactly.
#[test]
fn nothing_but_computed_headers_is_accepted() {
    let long = format!("disks/{}", "é".repeat(60));
    for member in [file("cpu", 10, 1024), namespace(&long, 1024), file("mem", 9 * GIB, 1024), file(MANIFEST, 9, 1024)] {
        let headers = member.headers();
        let limit = headers.len().min(4096);
        for at in (0..limit).chain(headers.len() - 512..headers.len()) {
            for byte in [0, b' ', b'0', b'/', b'\n', 0x80, headers[at] ^ 1] {
                let mut changed = headers.clone();
                changed[at] = byte;
                match Member::parse(1024, &changed) {
                    Ok(found) => assert_eq!(found.headers(), changed),
                    Err(error) => assert!(error.is_corrupt() && error.to_string().contains("offset 1024"), "{error}"),
                }
            }
        }
        for length in [0, 100, 511, headers.len() - 1, headers.len().saturating_sub(512)] {
            assert!(Member::parse(1024, &headers[..length]).is_err());
        }
    }
    let manifest = file(MANIFEST, 9, 1024).headers();
    assert!(Member::parse(1536, &manifest).unwrap_err().is_corrupt()); // it has another length there
}

#[test]
fn names_that_a_snapshot_cannot_have_are_refused() {
    for path in
        ["", ".", "..", "../x", "/etc", "a//b", "a/../b", "a\\b", "ENC_METADATA", "a/vmsnap_manifest", ".vmsnap-1"]
    {
        let headers = Member { path, kind: MemberKind::File, size: 1, mtime: MTIME, start: 1024 }.headers();
        assert!(Member::parse(1024, &headers).unwrap_err().is_corrupt(), "{path:?}");
    }
    for path in [KEY_METADATA, MANIFEST] {
        let headers = Member { path, kind: MemberKind::Namespace, size: 0, mtime: MTIME, start: 1024 }.headers();
        assert!(Member::parse(1024, &headers).unwrap_err().is_corrupt(), "{path:?}");
    }
    let sized = Member { path: "ns", kind: MemberKind::Namespace, size: 1, mtime: MTIME, start: 1024 }.headers();
    assert!(Member::parse(1024, &sized).unwrap_err().is_corrupt());
}

#[test]
fn headers_of_other_programs_are_refused() {
    use tar::{EntryType, Header};

    type Change = fn(&mut Header);
    let changes: [(&str, Change); 7] = [
        ("of the crate tar", |_| ()),
        ("symbolic link", |header| header.set_entry_type(EntryType::Symlink)),
        ("hard link", |header| header.set_entry_type(EntryType::Link)),
        ("sparse", |header| header.set_entry_type(EntryType::GNUSparse)),
        ("long name", |header| header.set_entry_type(EntryType::GNULongName)),
        ("mode", |header| header.set_mode(0o644)),
        ("owner", |header| header.set_uid(1000)),
    ];
    for header in [Header::new_gnu(), Header::new_ustar(), Header::new_old()] {
        for (name, change) in changes {
            let mut header = header.clone();
            header.set_path("cpu").unwrap();
            header.set_size(0);
            header.set_mtime(MTIME);
            header.set_mode(0o600);
            change(&mut header);
            header.set_cksum();
            assert!(Member::parse(1024, header.as_bytes()).unwrap_err().is_corrupt(), "{name}");
        }
    }
}

proptest! {
    #[test]
    fn any_member_is_described_exactly(
        names in prop::collection::vec("[a-zA-Zé𝄞 =\n0-9]{1,60}", 1..20),
        size in prop_oneof![0..70_000_u64, 8 * GIB - 2..8 * GIB + 2, 0..1_u64 << 62],
        start in prop_oneof![0..400_u64, 0..1_u64 << 50].prop_map(|block| block * 512),
        mtime in 0..=MAX_MTIME,
        is_namespace: bool,
    ) {
        let path = names.join("/");
        let (kind, size) = if is_namespace { (MemberKind::Namespace, 0) } else { (MemberKind::File, size) };
        check(Member::new(&path, kind, size, mtime, start).unwrap());
    }
}
