//! The metadata of an object that tells which fragment it is, so that a resumed push need not send it again.

use object_store::{Attribute, Attributes};

use super::Headed;
use crate::manifest::Proof;

/// The name of the metadata. All clouds allow it.
const PROOF: &str = "vmsnapproof";

/// The metadata of an object with these contents.
pub(crate) fn proof_attributes(proof: &Proof) -> Attributes {
    Attributes::from_iter([(Attribute::Metadata(PROOF.into()), proof_text(proof))])
}

/// The text that identifies the contents of a fragment.
fn proof_text(proof: &Proof) -> String {
    let (Proof::Blake3(digest) | Proof::HeaderTag { tag: digest, .. }) = proof;
    blake3::Hash::from_bytes(*digest).to_hex().to_string()
}

/// Whether an object has these contents, as its writer said.
pub(crate) fn has_proof(object: &Headed, proof: &Proof) -> bool {
    object.metadata(PROOF) == Some(&*proof_text(proof))
}
