//! Runs every test of the API again, with snapshots that are encrypted for the default identity.
#![cfg(feature = "age")]

use std::process::Command;

use vmsnap::crosvm::{SnapshotReader, SnapshotWriter};

use crate::{ENCRYPT, place};

#[test]
fn every_way_also_works_encrypted() {
    let (directory, ..) = place();
    let (identity, recipient) = vmsnap::generate_identity().unwrap();
    let done = Command::new(std::env::current_exe().unwrap())
        .args(["writing::", "reading::", "values::", "encrypted::in_the_second_run"])
        .env(ENCRYPT, "1")
        .env("VMSNAP_IDENTITY", &*vmsnap::identity_file(&identity, &recipient))
        .env("HOME", directory.path())
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{output}{}", String::from_utf8_lossy(&done.stderr));
    assert!(
        output.contains(
            "encrypted::in_the_second_run_snapshots_are_encrypted_for_the_identity_of_the_environment ... ok"
        ),
        "{output}"
    );
    assert!(output.contains("writing::a_box_in_an_option ... ok"), "{output}");
}

#[test]
fn in_the_second_run_snapshots_are_encrypted_for_the_identity_of_the_environment() {
    let (_directory, root, encrypt) = place();
    if !encrypt {
        return;
    }
    SnapshotWriter::new(root.clone(), true).unwrap().write_fragment("clock", &12).unwrap();
    assert!(root.join("enc_metadata").is_file() && std::fs::read(root.join("clock")).unwrap() != [12]);
    // Both if encryption is required and if not.
    for required in [true, false] {
        let reader = SnapshotReader::new(&root, required).unwrap();
        assert!(vmsnap::SnapshotReader::from(reader.clone()).is_encrypted());
        assert_eq!(reader.read_fragment::<u8>("clock").unwrap(), 12);
        assert_eq!(reader.list_fragments().unwrap(), ["clock"]);
    }
}
