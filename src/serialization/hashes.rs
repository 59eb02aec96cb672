//! The time that Python needs for dicts and sets with keys whose hash values an attacker can choose.
//!
//! The hash value of a text has a random key in every process, but the hash value of a number is almost the number
//! itself. Python looks for a free slot in an order that depends only on the hash value (`find_empty_slot` in
//! `Objects/dictobject.c`, `set_add_entry` in `Objects/setobject.c`; unchanged from 3.7 to 3.14). So an attacker can
//! choose numbers for which Python must look at most of the used slots: hours for some megabytes. This module counts
//! the slots first.

/// So few keys are always allowed, even if all of them collide.
const FEW: usize = 1000;

/// The limit of slots that are looked at for a key, on average. A random key takes 2 in a dict and 12 in a set. The
/// worst natural keys, multiples of 2^39 and 2^40, take 71 and 104.
const MAX_SLOTS_A_KEY: usize = 300;

/// The bits of the hash value that each further step adds: `PERTURB_SHIFT`.
const SHIFT: u32 = 5;

/// The slots that a set looks at in each step: the first, and `LINEAR_PROBES` more.
const ROW: usize = 10;

/// The modulus of the hash values of numbers: `sys.hash_info.modulus` with 64-bit pointers.
const MODULUS: u64 = (1 << 61) - 1;
const HASH_OF_INFINITY: u64 = 314_159;

/// Whether a dict or set of keys with these hash values takes far longer to build than one of random keys.
pub(crate) fn crowded(hashes: &[u64]) -> bool {
    if hashes.len() <= FEW {
        return false;
    }
    // Check each size that the table has while it grows; at most two thirds of it are used.
    let room = |bits: u32| (1_usize << bits) / 3 * 2;
    let last = (hashes.len() * 3).ilog2();
    (FEW.ilog2()..=last).any(|bits| {
        let hashes = hashes.get(..room(bits)).unwrap_or(hashes);
        is_crowded(hashes, bits, 1) || is_crowded(hashes, bits, ROW)
    })
}

/// Whether keys with these hash values crowd a table of `1 << bits` slots that is searched `row` slots per step.
fn is_crowded(hashes: &[u64], bits: u32, row: usize) -> bool {
    let mut taken = vec![false; 1 << bits];
    let mask = taken.len() - 1;
    let mut slots_left = hashes.len() * MAX_SLOTS_A_KEY;
    for hash in hashes {
        let mut rest = *hash;
        let mut slot = low_bits(rest) & mask;
        loop {
            let end = if slot + row <= mask { slot + row } else { slot + 1 };
            let slots = taken.get_mut(slot..end).unwrap_or_default();
            let looked_at = slots.iter().position(|taken| !taken).map_or(slots.len(), |free| free + 1);
            let Some(left) = slots_left.checked_sub(looked_at) else { return true };
            slots_left = left;
            if let Some(free) = slots.get_mut(looked_at - 1).filter(|taken| !**taken) {
                *free = true;
                break;
            }
            rest >>= SHIFT;
            slot = slot.wrapping_mul(5).wrapping_add(1).wrapping_add(low_bits(rest)) & mask;
        }
    }
    false
}

#[expect(clippy::cast_possible_truncation, reason = "bits above the table's size do not matter")]
fn low_bits(bits: u64) -> usize {
    bits as usize
}

/// `hash(magnitude)`, or of its negative.
pub(super) fn of_int(magnitude: u128, is_negative: bool) -> u64 {
    let hash = u64::try_from(magnitude % u128::from(MODULUS)).unwrap_or_default();
    match (is_negative, hash) {
        (false, _) => hash,
        // -1 means an error in C.
        (true, 1) => 1_u64.wrapping_neg() - 1,
        (true, _) => hash.wrapping_neg(),
    }
}

/// `hash(value)` of a value that is not NaN.
pub(super) fn of_float(value: f64) -> u64 {
    if value.is_infinite() {
        return of_int(HASH_OF_INFINITY.into(), value < 0.0);
    }
    let bits = value.to_bits();
    let exponent = u32::try_from(bits >> 52 & 0x7ff).unwrap_or_default();
    let fraction = bits & ((1 << 52) - 1);
    // The value is mantissa * 2^(exponent - 1075), and 2^61 is 1 to the modulus: 1075 is 23 less than 18 of these.
    let mantissa = if exponent == 0 { fraction << 1 } else { fraction | 1 << 52 };
    of_int(u128::from(mantissa) << ((exponent + 23) % 61), value < 0.0)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::{crowded, of_float, of_int};

    const SLOTS: u64 = 8192;

    /// The hash values of as many keys as a dict of 8192 slots takes. Some fill 2700 slots that a dict's steps pass
    /// last; the others find no free slot before these.
    fn chosen() -> Vec<u64> {
        let ways: Vec<_> = std::iter::successors(Some(0), |slot| Some((slot * 5 + 1) % SLOTS)).take(2700).collect();
        let taken: HashSet<_> = ways.iter().copied().collect();
        let mut hashes = ways.clone();
        for start in ways {
            extend(start, 13, start, 0, &taken, &mut hashes);
        }
        assert_eq!(hashes.len(), 5400);
        hashes
    }

    /// Adds the hash values with the given lowest `known` bits whose every step finds a used slot.
    fn extend(hash: u64, known: u32, slot: u64, step: u32, taken: &HashSet<u64>, hashes: &mut Vec<u64>) {
        if hashes.len() >= 5400 || !taken.contains(&slot) {
            return;
        }
        if step == 12 {
            // From here on, all take the same steps.
            return hashes.push(hash);
        }
        for more in 0..if known < 58 { 32 } else { 1 } {
            let hash = hash | more << known.min(63);
            let next = (slot * 5 + 1 + (hash >> (5 * (step + 1)))) % SLOTS;
            extend(hash, known + 5, next, step + 1, taken, hashes);
        }
    }

    #[test]
    fn keys_chosen_to_meet_in_a_dict_are_found() {
        assert!(crowded(&chosen()));
        // Also among other keys.
        let others: Vec<_> = chosen().into_iter().chain(1 << 40..(1 << 40) + 100_000).collect();
        assert!(crowded(&others));
    }

    #[test]
    fn equal_hash_values_are_found_where_they_are_many() {
        assert!(crowded(&[5; 1001]));
        assert!(!crowded(&[5; 1000]));
    }

    #[test]
    fn numbers_that_nobody_chose_to_be_bad_pass() {
        let count = 20_000_u64;
        for shift in 0..=50 {
            let multiples: Vec<_> = (0..count).map(|number| of_int(u128::from(number) << shift, false)).collect();
            assert!(!crowded(&multiples), "multiples of 2^{shift}");
        }
        for unit in [0.1, 1e-6, 1.0 / 3.0, 0.25, 2_f64.powi(-20), 2_f64.powi(-40), 1e30] {
            let multiples: Vec<_> = (0..20_000).map(|number| of_float(f64::from(number) * unit)).collect();
            assert!(!crowded(&multiples), "multiples of {unit}");
        }
    }

    #[test]
    fn hash_values_equal_those_in_python() {
        // The output of python3.11.
        let ints: [(u128, bool, i64); 7] = [
            (0, false, 0),
            (1, true, -2),
            (2, true, -2),
            ((1 << 61) - 1, false, 0),
            (u128::from(u64::MAX), false, 7),
            (1 << 64, true, -8),
            (u128::MAX, false, 63),
        ];
        for (magnitude, is_negative, hash) in ints {
            assert_eq!(of_int(magnitude, is_negative).cast_signed(), hash, "{magnitude}");
        }
        let floats = [
            (0.0, 0),
            (-0.0, 0),
            (1.0, 1),
            (-1.0, -2),
            (0.5, 1_152_921_504_606_846_976),
            (1.5, 1_152_921_504_606_846_977),
            (-2.75, -1_729_382_256_910_270_466),
            (1e300, 1_224_995_262_755_759_164),
            (5e-324, 16_777_216),
            (2.2e-308, 1_717_285_210_971_733_646),
            (0.1, 230_584_300_921_369_408),
            (f64::NEG_INFINITY, -314_159),
        ];
        for (value, hash) in floats {
            assert_eq!(of_float(value).cast_signed(), hash, "{value}");
        }
    }
}
