//! The crate as its users see it.

#[test]
fn placeholder() {}
