//! Properties of keys that the Python tests cannot check. The other tests are in `tests/test_keys.py`.

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use vmsnap::{Identity, KeyProvider, Passphrase, ProviderError, SecretKey, SnapshotOptions, SnapshotWriter};

use crate::place;

/// A key service that masks its argument, which protects nothing.
struct Mask {
    name: &'static str,
    delay: Duration,
}

impl KeyProvider for Mask {
    fn name(&self) -> &str {
        self.name
    }

    fn wrap(&self, payload: &[u8]) -> Result<Vec<u8>, ProviderError> {
        std::thread::sleep(self.delay);
        Ok(payload.iter().map(|byte| byte ^ 0xa5).collect())
    }

    fn unwrap(&self, wrapped: &[u8]) -> Result<Vec<u8>, ProviderError> {
        if wrapped.len() > 1000 { Err("too long".into()) } else { self.wrap(wrapped) }
    }

    fn timeout(&self) -> Duration {
        Duration::from_millis(200)
    }
}

fn mask(name: &'static str, delay: Duration) -> SnapshotOptions {
    SnapshotOptions::new().key_provider(Arc::new(Mask { name, delay }))
}

#[test]
fn a_key_service_of_the_caller_s_opens_what_it_wrapped() {
    let (_directory, root) = place();
    mask("mask", Duration::ZERO).create_in_place(&root).unwrap().write_fragment("a", &1).unwrap();
    assert_eq!(mask("mask", Duration::ZERO).open(&root).unwrap().read_fragment::<u8>("a").unwrap(), 1);
    let error = mask("other", Duration::ZERO).open(&root).unwrap_err();
    assert!(error.is_key_unavailable() && error.to_string().contains("\"mask\""), "{error}");
    let error = mask("mask", Duration::from_secs(3)).open(&root).unwrap_err();
    assert!(error.is_key_unavailable() && error.to_string().contains("did not answer within 0.2 s"), "{error}");
}

#[test]
fn nothing_of_a_secret_shows_in_options() {
    let options = SnapshotOptions::new()
        .key(SecretKey::from([7; 32]))
        .passphrase("hunter2".into())
        .identities([Identity::text("AGE-SECRET-KEY-1HUNTER2".to_owned()).with_passphrase("hunter2".into())]);
    let shown = format!("{options:?} {:?}", Identity::text("AGE-SECRET-KEY-1HUNTER2".to_owned()));
    assert!(!shown.to_lowercase().contains("hunter2") && !shown.contains("7, 7"), "{shown}");
    let error = options.open("/nowhere").unwrap_err();
    assert!(error.is_invalid_argument() && error.to_string().contains("together"), "{error}");
    let asked = Passphrase::ask(|| Err(std::io::Error::other("nobody there")));
    let (_directory, root) = place();
    let error = SnapshotOptions::new().passphrase(asked).create_in_place(&root).unwrap_err();
    assert!(!root.exists() && (error.is_key_unavailable() || error.is_unsupported_format()), "{error}");
}

#[cfg(feature = "age")]
#[test]
fn recipients_are_opened_by_identities() {
    let (directory, root) = place();
    let (identity, recipient) = vmsnap::generate_identity().unwrap();
    SnapshotOptions::new().recipients([&recipient]).create_in_place(&root).unwrap().write_fragment("a", &1).unwrap();
    let file = directory.path().join("id.txt");
    std::fs::write(&file, vmsnap::identity_file(&identity, &recipient).as_bytes()).unwrap();
    let open = |identity| SnapshotOptions::new().identities([identity]).open(&root);
    let error = open(Identity::file(&file)).unwrap_err();
    assert!(error.is_key_unavailable() && error.to_string().contains("chmod 600"), "{error}");
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    for identity in [Identity::text(identity.clone()), Identity::file(&file)] {
        assert_eq!(vmsnap::recipients_of(&identity).unwrap(), [recipient.as_str()]);
        assert_eq!(open(identity).unwrap().read_fragment::<u8>("a").unwrap(), 1);
    }
    let wrapping = vmsnap::KeyWrapping::Age { recipients: vec!["X25519".to_owned()] };
    assert_eq!(vmsnap::inspect(&root).unwrap().key_wrapping, Some(wrapping));
}

/// Set in the child process, whose environment has another home directory: the directory for its snapshots.
#[cfg(feature = "age")]
const NEW_IDENTITY: &str = "VMSNAP_TEST_NEW_IDENTITY";

#[cfg(feature = "age")]
#[test]
fn a_callback_hears_of_a_new_identity_and_can_prevent_it() {
    if let Some(directory) = std::env::var_os(NEW_IDENTITY).map(std::path::PathBuf::from) {
        let identity = directory.join("config/vmsnap/identity.txt");
        let prevented = SnapshotOptions::new().encrypt(true).on_new_identity(|_| Err(vmsnap::Error::interrupted()));
        assert!(prevented.create(directory.join("vm1")).unwrap_err().is_interrupted());
        assert!(!directory.join("config").exists() && !directory.join("vm1").exists());

        let heard = Arc::new(std::sync::Mutex::new(Vec::new()));
        let (paths, expected) = (Arc::clone(&heard), identity.clone());
        let told = SnapshotOptions::new().encrypt(true).on_new_identity(move |path| {
            assert!(path == expected && !path.exists());
            paths.lock().unwrap().push(path.to_owned());
            Ok(())
        });
        for name in ["vm1", "vm2"] {
            told.create(directory.join(name)).unwrap().commit().unwrap();
        }
        assert_eq!(*heard.lock().unwrap(), [identity]);
        std::fs::remove_dir_all(directory.join("config")).unwrap();
        SnapshotOptions::new().encrypt(true).create(directory.join("vm3")).unwrap().commit().unwrap();
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap());
    for name in ["VMSNAP_IDENTITY", "VMSNAP_IDENTITY_FILE", "CREDENTIALS_DIRECTORY"] {
        child.env_remove(name);
    }
    let done = child
        .args(["--exact", "keys::a_callback_hears_of_a_new_identity_and_can_prevent_it", "--nocapture"])
        .env(NEW_IDENTITY, directory.path())
        .env("XDG_CONFIG_HOME", directory.path().join("config"))
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{stderr}");
    // The library itself prints nothing.
    assert_eq!(stderr, "");
    assert!(directory.path().join("vm3").exists());
}

#[cfg(not(feature = "age"))]
#[test]
fn a_build_without_age_says_so() {
    let (_directory, root) = place();
    let age = [
        SnapshotOptions::new().recipients(["age1"]),
        SnapshotOptions::new().passphrase("hunter2".into()),
        SnapshotOptions::new().encrypt(true),
    ];
    for options in age {
        if std::env::var_os("VMSNAP_IDENTITY").is_none() {
            // It does not search for an identity or make one either.
            let error = options.create_in_place(&root).unwrap_err();
            assert!(error.is_unsupported_format() && error.to_string().contains("feature `age`"), "{error}");
            assert!(!root.exists());
        }
    }
    SnapshotOptions::new().key(SecretKey::from([1; 32])).create_in_place(&root).unwrap();
    let whole = [b"age-encryption.org/v1\n-> X25519 x\n\n--- x\n".as_slice(), &[0; 32]].concat();
    std::fs::write(root.join("enc_metadata"), whole).unwrap();
    let error = SnapshotOptions::new().open(&root).unwrap_err();
    assert!(error.is_unsupported_format() && error.to_string().contains("feature `age`"), "{error}");
    assert!(vmsnap::generate_identity().unwrap_err().is_unsupported_format());
}

/// Set in the child process, whose memory is searched.
const IN_CHILD: &str = "VMSNAP_TEST_MEMORY";

/// Writes and reads an encrypted snapshot, drops everything, and searches the memory of the process for the data key.
#[test]
fn no_key_is_left_in_memory() {
    if std::env::var_os(IN_CHILD).is_none() {
        let this = std::env::current_exe().unwrap();
        let done = Command::new(this)
            .args(["--exact", "keys::no_key_is_left_in_memory", "--nocapture", "--test-threads", "1"])
            .env(IN_CHILD, "1")
            .output()
            .unwrap();
        let text = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        assert!(done.status.success() && text.contains("memory searched"), "{text}");
        return;
    }
    let kept = Box::new(std::array::from_fn(|index| u8::try_from(index * 7 + 3).unwrap()));
    assert!(places_of(&kept) > 0, "the search finds nothing");
    drop(kept);
    let key = SnapshotOptions::new().key(SecretKey::generate().unwrap());
    let masked = use_a_snapshot(&key, &key);
    assert_eq!(places_of_masked(&masked), 0, "with a key");
    #[cfg(feature = "age")]
    {
        let (identity, recipient) = vmsnap::generate_identity().unwrap();
        let writing = SnapshotOptions::new().recipients([recipient]);
        let reading = SnapshotOptions::new().identities([Identity::text(identity)]);
        let masked = use_a_snapshot(&writing, &reading);
        assert_eq!(places_of_masked(&masked), 0, "with age");
    }
    println!("memory searched");
}

const MASK: u8 = 0x5a;

/// Returns the masked data key of a snapshot that was written, read and wrapped again.
#[inline(never)]
fn use_a_snapshot(writing: &SnapshotOptions, reading: &SnapshotOptions) -> [u8; 32] {
    let (_directory, root) = place();
    let writer = writing.create_in_place(&root).unwrap();
    let masked = data_key_of(&writer);
    for (name, bytes) in [("small", 100), ("large", 5 << 20)] {
        let mut fragment = writer.raw_fragment_with_chunk_size(name, 65536).unwrap();
        std::io::Write::write_all(&mut fragment, &vec![1; bytes]).unwrap();
        fragment.finish().unwrap();
    }
    let reader = reading.open(&root).unwrap();
    let mut content = Vec::new();
    reader.clone().raw_fragment("large").unwrap().read_to_end(&mut content).unwrap();
    assert_eq!(content.len(), 5 << 20);
    vmsnap::rekey(&root, reading, &SnapshotOptions::new().key(SecretKey::from([9; 32]))).unwrap();
    masked
}

/// Masks the key and keeps nothing else of it.
fn data_key_of(writer: &SnapshotWriter) -> [u8; 32] {
    let mut state = Vec::with_capacity(4096);
    ciborium::into_writer(writer, &mut state).unwrap();
    let name = state.windows(8).position(|part| part == b"data_key").unwrap();
    // The head of a byte string with 32 bytes is 0x58 0x20.
    let start = name + 8 + 2;
    assert_eq!(state[name + 8..start], [0x58, 0x20]);
    let masked = std::array::from_fn(|index| state[start + index] ^ MASK);
    state.fill(0);
    std::hint::black_box(&state);
    masked
}

fn places_of(key: &[u8; 32]) -> usize {
    places_of_masked(&key.map(|byte| byte ^ MASK))
}

/// Returns in how many places of the process's memory one half of the key behind `masked` is.
fn places_of_masked(masked: &[u8; 32]) -> usize {
    const HALF: u64 = 16;
    let memory = std::fs::File::open("/proc/self/mem").unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mut piece = vec![0; 64 << 10];
    // The buffer of the search must not be found itself.
    let own = piece.as_ptr().addr() as u64..piece.as_ptr().addr() as u64 + piece.len() as u64;
    let mut found = 0;
    for line in maps.lines() {
        let (range, rest) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let (start, end) = (u64::from_str_radix(start, 16).unwrap(), u64::from_str_radix(end, 16).unwrap());
        let parts = [(start, end.min(own.start)), (start.max(own.end), end)];
        for (start, end) in parts.into_iter().filter(|(start, end)| rest.starts_with("rw") && start < end) {
            let mut at = start;
            while at + HALF <= end {
                let size = usize::try_from(end - at).unwrap().min(piece.len());
                if memory.read_exact_at(&mut piece[..size], at).is_err() {
                    break;
                }
                for half in [&masked[..16], &masked[16..]] {
                    for (offset, window) in piece[..size].windows(16).enumerate() {
                        if window.iter().zip(half).all(|(byte, masked)| byte ^ MASK == *masked) {
                            found += 1;
                            eprintln!("at {:#x} of {line}", at + offset as u64);
                        }
                    }
                }
                at += size as u64 - (HALF - 1);
                if size < piece.len() {
                    break;
                }
            }
        }
    }
    piece.fill(0);
    std::hint::black_box(&piece);
    found
}
