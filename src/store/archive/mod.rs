//! A snapshot in one file: section 7 of `docs/format.md`.

pub(crate) mod assemble;
pub(crate) mod front;
pub(crate) mod layout;
pub(crate) mod member;
