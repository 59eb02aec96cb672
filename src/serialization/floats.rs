//! JSON with floats in the form that crosvm printed.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::Formatter;

/// Like `serde_json::to_writer`, with the same output for all versions of `serde_json`.
pub(super) fn to_writer<T: Serialize + ?Sized>(writer: impl Write, value: &T) -> serde_json::Result<()> {
    value.serialize(&mut Serializer::with_formatter(writer, CrosvmFormatter))
}

/// No white space, and floats in the form of `ryu`: `1e300`. `serde_json` prints `1e+300` since 1.0.147.
struct CrosvmFormatter;

impl Formatter for CrosvmFormatter {
    fn write_f32<W: Write + ?Sized>(&mut self, writer: &mut W, value: f32) -> io::Result<()> {
        writer.write_all(ryu::Buffer::new().format_finite(value).as_bytes())
    }

    fn write_f64<W: Write + ?Sized>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(ryu::Buffer::new().format_finite(value).as_bytes())
    }
}
