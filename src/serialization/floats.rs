//! JSON with floats as crosvm printed them.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::Formatter;

/// As `serde_json::to_writer`, whatever the version of `serde_json`.
pub(super) fn to_writer<T: Serialize + ?Sized>(writer: impl Write, value: &T) -> serde_json::Result<()> {
    value.serialize(&mut Serializer::with_formatter(writer, CrosvmFormatter))
}

/// No white space, and floats as `ryu` prints them: `1e300`. From 1.0.147 on `serde_json` has `1e+300`.
struct CrosvmFormatter;

impl Formatter for CrosvmFormatter {
    fn write_f32<W: Write + ?Sized>(&mut self, writer: &mut W, value: f32) -> io::Result<()> {
        writer.write_all(ryu::Buffer::new().format_finite(value).as_bytes())
    }

    fn write_f64<W: Write + ?Sized>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(ryu::Buffer::new().format_finite(value).as_bytes())
    }
}
