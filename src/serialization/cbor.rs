//! A check for CBOR (RFC 8949) that every decoder understands in the same way, and that harms none.

use super::hashes;
use super::malformed::{MAX_DEPTH, Malformed};

/// The limit of comparisons of keys. An attacker can choose keys that are arrays, tagged values or sets so that all
/// have the same hash value; each is then compared with all others of its map, byte by byte. (At most 16 numbers share
/// a hash value.) This many comparisons take seconds: ten thousand such keys of 20 bytes in one map.
const MAX_KEY_COMPARISONS: u64 = 2_000_000_000;

/// The limit of rows of an array without elements, which nothing else bounds.
const MAX_EMPTY_ROWS: u64 = 1 << 20;

/// Checks that `bytes` are one well-formed item, with no other tags than vmsnap's, no other simple values than false,
/// true and null, and hashable keys.
///
/// The decoder finds duplicate keys, because equality depends on its types.
pub(super) fn check(bytes: &[u8]) -> Result<(), Malformed> {
    let mut scanner = Scanner { bytes, at: 0, key_comparisons: 0 };
    scanner.item(1, Role::Value)?;
    if scanner.at == bytes.len() { Ok(()) } else { Err(Malformed::new(scanner.at, "bytes follow its end")) }
}

/// Whether an item is a value, or a key of a map or member of a set, which must be hashable.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Value,
    Key,
}

/// The head of an item: its major type and argument.
#[derive(Clone, Copy)]
struct Head {
    start: usize,
    major: u8,
    argument: Argument,
}

#[derive(Clone, Copy)]
enum Argument {
    Number(u64),
    /// The item ends with a break.
    Indefinite,
}

/// The keys of one map, or members of one set, whose hash values an attacker can choose.
#[derive(Default)]
struct Collidable {
    /// The hash values of numbers in Python.
    numbers: Vec<u64>,
    /// The number of arrays, tagged values and sets, and their total length.
    composed: u64,
    composed_bytes: u64,
}

struct Scanner<'a> {
    bytes: &'a [u8],
    at: usize,
    key_comparisons: u64,
}

impl<'a> Scanner<'a> {
    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let taken = self
            .bytes
            .get(self.at..)
            .and_then(|rest| rest.get(..count))
            .ok_or_else(|| Malformed::new(self.bytes.len(), "it is truncated"))?;
        self.at += count;
        Ok(taken)
    }

    fn head(&mut self) -> Result<Head, Malformed> {
        let start = self.at;
        let first = self.take(1)?.first().copied().unwrap_or_default();
        let (major, info) = (first >> 5, first & 0x1f);
        let argument = match info {
            0..24 => Argument::Number(u64::from(info)),
            24..28 => {
                let bytes = self.take(1 << (info - 24))?;
                Argument::Number(bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
            }
            31 if matches!(major, 2..=5 | 7) => Argument::Indefinite,
            _ => return Err(Malformed::new(start, format!("the byte {first:#04x} does not begin an item"))),
        };
        Ok(Head { start, major, argument })
    }

    fn item(&mut self, depth: usize, role: Role) -> Result<(), Malformed> {
        let head = self.head()?;
        self.rest_of(&head, depth, role)
    }

    fn rest_of(&mut self, head: &Head, depth: usize, role: Role) -> Result<(), Malformed> {
        if depth > MAX_DEPTH && matches!(head.major, 4..=6) {
            return Err(Malformed::too_deep(head.start));
        }
        match (head.major, &head.argument) {
            (0 | 1, _) => Ok(()),
            (2, _) => self.string(head, |_| true).map(drop),
            (3, _) => self.text(head),
            (4, argument) => self.array(head.start, argument, depth, role),
            (5, argument) if role == Role::Value => self.map(head.start, argument, depth),
            (5, _) => Err(Malformed::new(head.start, "a key is a map")),
            (6, Argument::Number(tag)) => self.tagged(head.start, *tag, depth, role),
            (_, argument) => self.simple(head.start, argument, role),
        }
    }

    /// Scans the bytes of a string, which may consist of several parts; returns their number.
    fn string(&mut self, head: &Head, good: impl Fn(&[u8]) -> bool) -> Result<usize, Malformed> {
        let part = |scanner: &mut Self, start: usize, length: u64| {
            let bytes = usize::try_from(length).ok().filter(|length| *length <= scanner.left()).ok_or_else(|| {
                let left = scanner.left();
                Malformed::new(start, format!("a string declares {length} bytes, but only {left} are left"))
            });
            let bytes = scanner.take(bytes?)?;
            if good(bytes) { Ok(bytes.len()) } else { Err(Malformed::new(start, "a text is not UTF-8")) }
        };
        match head.argument {
            Argument::Number(length) => part(self, head.start, length),
            Argument::Indefinite => {
                let mut total = 0;
                loop {
                    match self.head()? {
                        Head { major: 7, argument: Argument::Indefinite, .. } => return Ok(total),
                        Head { start, major, argument: Argument::Number(length) } if major == head.major => {
                            total += part(self, start, length)?;
                        }
                        other => {
                            return Err(Malformed::new(
                                other.start,
                                "a part of a string is not a string of the same kind",
                            ));
                        }
                    }
                }
            }
        }
    }

    fn text(&mut self, head: &Head) -> Result<(), Malformed> {
        self.string(head, |bytes| std::str::from_utf8(bytes).is_ok()).map(drop)
    }

    fn array(&mut self, start: usize, argument: &Argument, depth: usize, role: Role) -> Result<(), Malformed> {
        self.members(start, argument, 1, |scanner, head| scanner.rest_of(head, depth + 1, role))
    }

    fn map(&mut self, start: usize, argument: &Argument, depth: usize) -> Result<(), Malformed> {
        let mut collidable = Collidable::default();
        self.members(start, argument, 2, |scanner, head| {
            scanner.key(head, depth, &mut collidable)?;
            scanner.item(depth + 1, Role::Value)
        })?;
        self.compare(start, &collidable)
    }

    fn set(&mut self, start: usize, argument: &Argument, depth: usize) -> Result<(), Malformed> {
        let mut collidable = Collidable::default();
        self.members(start, argument, 1, |scanner, head| scanner.key(head, depth, &mut collidable))?;
        self.compare(start, &collidable)
    }

    fn key(&mut self, head: &Head, depth: usize, collidable: &mut Collidable) -> Result<(), Malformed> {
        self.rest_of(head, depth + 1, Role::Key)?;
        match (head.major, head.argument) {
            (0 | 1, Argument::Number(number)) => {
                let is_negative = head.major == 1;
                let magnitude = u128::from(number) + u128::from(is_negative);
                collidable.numbers.push(hashes::of_int(magnitude, is_negative));
            }
            (7, Argument::Number(bits)) => {
                collidable.numbers.extend(self.float(head.start, bits).map(hashes::of_float));
            }
            (4 | 6, _) => {
                collidable.composed += 1;
                collidable.composed_bytes += u64::try_from(self.at - head.start).unwrap_or(u64::MAX);
            }
            // The hash value of a string has another random key in every process.
            _ => {}
        }
        Ok(())
    }

    fn compare(&mut self, start: usize, collidable: &Collidable) -> Result<(), Malformed> {
        let Collidable { numbers, composed, composed_bytes } = collidable;
        self.key_comparisons = self.key_comparisons.saturating_add(composed.saturating_mul(*composed_bytes));
        if self.key_comparisons > MAX_KEY_COMPARISONS {
            return Err(Malformed::new(
                start,
                format!("too many of its keys ({composed}) are arrays, tagged values or sets"),
            ));
        }
        if hashes::crowded(numbers) {
            return Err(Malformed::new(start, "its keys are numbers whose hash values collide"));
        }
        Ok(())
    }

    /// Scans the members of a container. Each consists of `items` items; `member` gets the head of the first.
    fn members(
        &mut self,
        start: usize,
        argument: &Argument,
        items: u64,
        mut member: impl FnMut(&mut Self, &Head) -> Result<(), Malformed>,
    ) -> Result<(), Malformed> {
        match *argument {
            Argument::Number(count) => {
                // Before a decoder allocates memory for them: each item has at least one byte.
                let left = self.left();
                if u64::try_from(left).is_ok_and(|left| count > left / items) {
                    let what = if items == 1 { "items" } else { "pairs" };
                    return Err(Malformed::new(
                        start,
                        format!("a container declares {count} {what}, but only {left} bytes are left"),
                    ));
                }
                (0..count).try_for_each(|_| {
                    let head = self.head()?;
                    member(self, &head)
                })
            }
            Argument::Indefinite => loop {
                let head = self.head()?;
                if head.major == 7 && matches!(head.argument, Argument::Indefinite) {
                    return Ok(());
                }
                member(self, &head)?;
            },
        }
    }

    /// Tags of RFC 8949, RFC 8746 (arrays), RFC 8943 (dates), and 37 and 258 of the registry (UUID, set).
    fn tagged(&mut self, start: usize, tag: u64, depth: usize, role: Role) -> Result<(), Malformed> {
        if role == Role::Key && !matches!(tag, 0..=3 | 37 | 258 | 1004) {
            return Err(Malformed::new(start, format!("a key has tag {tag}")));
        }
        let head = self.head()?;
        let wrong = |what: &str| Err(Malformed::new(start, format!("tag {tag} is not on {what}")));
        match (tag, head.major) {
            (0 | 1004, 3) => self.text(&head),
            (0 | 1004, _) => wrong("a text"),
            (1, 0 | 1) => Ok(()),
            (1, 7) if self.at - head.start > 2 => self.rest_of(&head, depth + 1, role),
            (1, _) => wrong("a number"),
            (2 | 3, 2) => self.string(&head, |_| true).map(drop),
            (2 | 3, _) => wrong("a byte string"),
            (37, 2) => match self.string(&head, |_| true)? {
                16 => Ok(()),
                _ => wrong("16 bytes"),
            },
            (37, _) => wrong("16 bytes"),
            (40 | 1040, 4) => self.shaped(&head, depth + 1),
            (40 | 1040, _) => wrong("an array of dimensions and elements"),
            (258, 4) => {
                if depth + 1 > MAX_DEPTH {
                    return Err(Malformed::too_deep(head.start));
                }
                self.set(head.start, &head.argument, depth + 1)
            }
            (258, _) => wrong("an array"),
            _ => match (element_bytes(tag), head.major) {
                (Some(size), 2) => {
                    let length = self.string(&head, |_| true)?;
                    if length % size == 0 { Ok(()) } else { wrong(&format!("elements of {size} bytes")) }
                }
                (Some(_), _) => wrong("a byte string"),
                (None, _) => Err(Malformed::new(start, format!("tag {tag} is unknown"))),
            },
        }
    }

    /// Scans the contents of tag 40: dimensions and a typed array. The decoder compares the number of elements.
    fn shaped(&mut self, head: &Head, depth: usize) -> Result<(), Malformed> {
        let mut index = 0;
        self.members(head.start, &head.argument, 1, |scanner, part| {
            index += 1;
            match (index, part.major, &part.argument) {
                (1, 4, dimensions) => scanner.dimensions(part.start, dimensions),
                (2, 6, Argument::Number(tag)) if element_bytes(*tag).is_some() => {
                    scanner.tagged(part.start, *tag, depth + 1, Role::Value)
                }
                _ => Err(Malformed::new(part.start, "a shaped array does not consist of dimensions and a typed array")),
            }
        })?;
        if index == 2 { Ok(()) } else { Err(Malformed::new(head.start, "a shaped array lacks its elements")) }
    }

    fn dimensions(&mut self, start: usize, dimensions: &Argument) -> Result<(), Malformed> {
        let (mut rows, mut is_empty) = (1_u64, false);
        self.members(start, dimensions, 1, |_, dimension| match (dimension.major, dimension.argument) {
            (0, Argument::Number(size)) => {
                is_empty |= size == 0;
                rows = rows.saturating_mul(size.max(1));
                Ok(())
            }
            _ => Err(Malformed::new(dimension.start, "a dimension is not an unsigned integer")),
        })?;
        if is_empty && rows > MAX_EMPTY_ROWS {
            return Err(Malformed::new(start, format!("an array without elements has {rows} rows")));
        }
        Ok(())
    }

    fn simple(&mut self, start: usize, argument: &Argument, role: Role) -> Result<(), Malformed> {
        match (argument, self.at - start) {
            (Argument::Number(20..=22), 1) => Ok(()),
            (Argument::Number(bits), 3 | 5 | 9) => {
                let is_nan = self.float(start, *bits).is_some_and(f64::is_nan);
                if is_nan && role == Role::Key {
                    Err(Malformed::new(start, "a key is not a number (NaN)"))
                } else {
                    Ok(())
                }
            }
            (Argument::Indefinite, _) => Err(Malformed::new(start, "a break is at the wrong place")),
            _ => Err(Malformed::new(start, "a simple value is not false, true or null")),
        }
    }

    /// The float whose head began at `start` and has just been read. The length of the head gives the number of bits.
    fn float(&self, start: usize, bits: u64) -> Option<f64> {
        match self.at - start {
            3 => u16::try_from(bits).ok().map(half),
            5 => u32::try_from(bits).ok().map(|bits| f32::from_bits(bits).into()),
            9 => Some(f64::from_bits(bits)),
            _ => None,
        }
    }
}

/// A float of 16 bits: RFC 8949, appendix D.
fn half(bits: u16) -> f64 {
    let exponent = i32::from(bits >> 10 & 0x1f);
    let fraction = f64::from(bits & 0x3ff);
    let magnitude = match exponent {
        0 => fraction * 2_f64.powi(-24),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (fraction + 1024.0) * 2_f64.powi(exponent - 25),
    };
    if bits & 0x8000 == 0 { magnitude } else { -magnitude }
}
/// The size of an element of a typed array: RFC 8746, 2.1, without its 128-bit floats.
fn element_bytes(tag: u64) -> Option<usize> {
    match tag {
        64 | 68 | 72 => Some(1),
        65 | 69 | 73 | 77 | 80 | 84 => Some(2),
        66 | 70 | 74 | 78 | 81 | 85 => Some(4),
        67 | 71 | 75 | 79 | 82 | 86 => Some(8),
        _ => None,
    }
}
