//! The known-answer vectors, and each provider against the other.

use std::path::PathBuf;

use super::*;

const VECTOR_AAD: &[u8] = b"This is AAD";

/// Vectors made with segments of 40 bytes, less than the 64 that fast-floe accepts. The readers in other languages have
/// no such floor and are tested with them.
const BELOW_MINIMUM: [&str; 2] = ["java_lastSegAligned", "java_lastSegEmpty"];

type Vector = (String, Vec<u8>, Vec<u8>);

/// Name, ciphertext and plaintext of each vector; none where they are not at hand.
fn vectors() -> Option<Vec<Vector>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/vectors/floe");
    let Ok(entries) = std::fs::read_dir(&folder) else {
        assert!(std::env::var("VMSNAP_REQUIRE_ALL").as_deref() != Ok("1"), "no vectors at {}", folder.display());
        eprintln!("skipped: no known-answer vectors at {}", folder.display());
        return None;
    };
    let read =
        |name: &str, kind: &str| unhex(&std::fs::read_to_string(folder.join(format!("{name}_{kind}.txt"))).unwrap());
    let mut names: Vec<_> = entries
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.strip_suffix("_ct.txt").map(str::to_owned))
        .collect();
    names.sort();
    Some(names.into_iter().map(|name| (name.clone(), read(&name, "ct"), read(&name, "pt"))).collect())
}

fn unhex(text: &str) -> Vec<u8> {
    let text = text.trim();
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// Decrypts a whole message segment by segment, last one first, as a fragment is decrypted.
fn decrypt_all(provider: Provider, key: &SecretKey, aad: &[u8], message: &[u8]) -> Result<Vec<u8>> {
    let header: [u8; HEADER_BYTES] = message[..HEADER_BYTES].try_into().unwrap();
    check_declared_chunk_size(header)?;
    let decryption = Decryption::start_with(provider, key, aad, header, message.len() as u64)?;
    let chunk = decryption.chunk_size_bytes();
    let mut decryptor = decryption.decryptor();
    let mut plaintext = vec![0; usize::try_from(decryption.size()).unwrap()];
    for index in (0..=decryption.last_index()).rev() {
        let start = usize::try_from(index).unwrap() * chunk;
        let length = if index == decryption.last_index() { decryption.last_chunk_bytes() } else { chunk };
        let offset = usize::try_from(segment_offset(index, chunk)).unwrap();
        let segment = &message[offset..offset + length + SEGMENT_OVERHEAD_BYTES];
        decryptor.decrypt(index, segment, &mut plaintext[start..start + length])?;
    }
    Ok(plaintext)
}

fn encrypt_all(provider: Provider, key: &SecretKey, aad: &[u8], chunk: usize, plaintext: &[u8]) -> Vec<u8> {
    let (encryption, header) = Encryption::start_with(provider, key, aad, chunk).unwrap();
    let mut message = header.to_vec();
    let mut encryptor = encryption.encryptor();
    let full = plaintext.len().saturating_sub(1) / chunk;
    for (index, part) in plaintext.chunks(chunk).take(full).enumerate() {
        let mut segment = vec![0; segment_size(chunk)];
        encryptor.encrypt(index as u64, part, &mut segment).unwrap();
        message.extend(segment);
    }
    let last = &plaintext[full * chunk..];
    let mut segment = vec![0; last.len() + SEGMENT_OVERHEAD_BYTES];
    encryptor.encrypt_last(full as u64, last, &mut segment).unwrap();
    message.extend(segment);
    message
}

fn pattern(length: usize) -> Vec<u8> {
    (0_u8..251).cycle().take(length).collect()
}

#[test]
fn both_providers_decrypt_the_known_answers() {
    let Some(vectors) = vectors() else { return };
    let key = SecretKey::from([0; KEY_BYTES]);
    let mut decrypted = 0;
    for (name, encrypted, plaintext) in &vectors {
        for (provider, _) in PROVIDERS.iter().map(|(name, provider)| (*provider, name)) {
            if BELOW_MINIMUM.contains(&name.as_str()) {
                assert!(
                    check_declared_chunk_size(encrypted[..HEADER_BYTES].try_into().unwrap()).unwrap_err().is_corrupt()
                );
                continue;
            }
            assert_eq!(&decrypt_all(provider, &key, VECTOR_AAD, encrypted).unwrap(), plaintext, "{name}");
            decrypted += 1;
        }
    }
    // Ten vectors: four languages and the published Java ones, segments of 64 and of 4096 bytes.
    assert_eq!(decrypted, 10 * PROVIDERS.len());
}

#[test]
fn each_provider_decrypts_what_the_others_encrypted() {
    let key = SecretKey::generate().unwrap();
    for chunk in [32, 33, 4096, 65_537] {
        for length in [0, 1, chunk - 1, chunk, chunk + 1, 2 * chunk, 5 * chunk + 7] {
            let plaintext = pattern(length);
            for (_, encryption) in PROVIDERS {
                let message = encrypt_all(*encryption, &key, b"aad", chunk, &plaintext);
                for (_, decryption) in PROVIDERS {
                    assert_eq!(decrypt_all(*decryption, &key, b"aad", &message).unwrap(), plaintext);
                    assert!(decrypt_all(*decryption, &key, b"AAD", &message).unwrap_err().is_authentication());
                }
            }
        }
    }
}

#[test]
fn a_segment_that_does_not_verify_leaves_only_zeros() {
    let key = SecretKey::generate().unwrap();
    for (_, provider) in PROVIDERS {
        let mut message = encrypt_all(*provider, &key, b"", 64, &pattern(150));
        message[HEADER_BYTES + 20] ^= 1;
        let header = message[..HEADER_BYTES].try_into().unwrap();
        let mut decryptor =
            Decryption::start_with(*provider, &key, b"", header, message.len() as u64).unwrap().decryptor();
        let mut out = [0xff; 64];
        let segment = &message[HEADER_BYTES..HEADER_BYTES + segment_size(64)];
        assert!(decryptor.decrypt(0, segment, &mut out).unwrap_err().is_authentication());
        assert_eq!(out, [0; 64]);
    }
}

#[test]
fn an_empty_last_segment_after_full_ones_is_accepted() {
    let key = SecretKey::generate().unwrap();
    for (_, provider) in PROVIDERS {
        let mut encryptor =
            fast_floe::online::Encryptor::new(&key.bound(*provider), b"", parameters(64).unwrap()).unwrap();
        let mut message = encryptor.header().as_bytes().to_vec();
        message.extend(encryptor.encrypt_non_final_segment(&[7; 64]).unwrap());
        message.extend(encryptor.encrypt_final_segment(&[]).unwrap());
        assert_eq!(decrypt_all(*provider, &key, b"", &message).unwrap(), [7; 64]);
    }
}

#[test]
fn short_messages_decrypt_with_the_same_key_and_aad_only() {
    let key = SecretKey::generate().unwrap();
    let encrypted = encrypt_message(&key, b"a", 1024, b"secret").unwrap();
    assert!(encrypted.starts_with(&message_prefix(1024)));
    assert_eq!(**decrypt_message(&key, b"a", 1024, &encrypted).unwrap(), *b"secret");
    assert!(decrypt_message(&key, b"b", 1024, &encrypted).unwrap_err().is_authentication());
    assert!(decrypt_message(&SecretKey::generate().unwrap(), b"a", 1024, &encrypted).unwrap_err().is_authentication());
}

#[test]
fn keys_are_never_shown() {
    let key = SecretKey::from([0xab; KEY_BYTES]);
    assert_eq!(format!("{key:?}"), "SecretKey(…)");
    assert!(SecretKey::from_slice(&[0xab; 31]).unwrap_err().to_string().contains("31"));
}
