//! Judges whether a key can be guessed, for the daemon, `check-config` and the doctor.
//!
//! An attacker who records one request can try keys on it offline. No rate limit slows this down.

use fence_common::key::Key;

/// The shortest key, in bytes. A shorter one can be guessed.
pub const LEN_MIN: usize = 16;

/// The least information, in bits, that a key must hold. Sixteen random bytes are estimated at more
/// than 50.
const BITS_MIN: f64 = 40.0;

/// Why a key can be guessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weakness {
    /// The key has only this many bytes.
    Short(usize),
    /// The bytes are nearly all the same, or repeat, or count.
    Monotonous,
}

/// The key's weakness. A strong key is never called weak. A weak one may pass, since a password
/// looks like any text.
#[must_use]
pub fn weakness(key: &Key) -> Option<Weakness> {
    let bytes = key.dangerous_bytes();
    if bytes.len() < LEN_MIN {
        return Some(Weakness::Short(bytes.len()));
    }
    let piece = period(bytes.len(), |one, other| bytes.get(one) == bytes.get(other));
    let bytes = bytes.get(..piece).unwrap_or(bytes);
    // Counts the bytes as they are, then the steps between them ("0123..."), then without
    // repetitions (a short word that zeros fill up).
    let pairs = || bytes.iter().zip(bytes.iter().skip(1));
    let looks = [
        Histogram::of(bytes.iter().copied()),
        Histogram::of(pairs().map(|(one, next)| next.wrapping_sub(*one))),
        Histogram::of(pairs().filter(|(one, next)| one != next).map(|(_, next)| *next)),
    ];
    looks.iter().any(|look| look.bits() < BITS_MIN).then_some(Weakness::Monotonous)
}

/// How often each byte occurs. It is as secret as the key, and wiped with it.
struct Histogram(zeroize::Zeroizing<[u32; 256]>);

impl Histogram {
    fn of(bytes: impl Iterator<Item = u8>) -> Self {
        let mut counts = zeroize::Zeroizing::new([0_u32; 256]);
        for byte in bytes {
            if let Some(count) = counts.get_mut(usize::from(byte)) {
                *count = count.saturating_add(1);
            }
        }
        Self(counts)
    }

    /// Shannon's estimate of the information in all bytes, as if each were chosen independently.
    fn bits(&self) -> f64 {
        let all: u32 = self.0.iter().sum();
        let of = |count: &u32| f64::from(*count) * (f64::from(all) / f64::from(*count)).log2();
        self.0.iter().filter(|count| **count > 0).map(of).sum()
    }
}

/// The length of the piece that repeats through all `len` bytes; `len` if none does. `same`
/// compares two of the bytes.
fn period(len: usize, same: impl Fn(usize, usize) -> bool) -> usize {
    // The prefix function of Knuth, Morris and Pratt needs linear time only.
    let mut borders = zeroize::Zeroizing::new(vec![0_usize; len]);
    let mut border = 0_usize;
    for at in 1..len {
        while border > 0 && !same(border, at) {
            border = borders.get(border.saturating_sub(1)).copied().unwrap_or(0);
        }
        if same(border, at) {
            border = border.saturating_add(1);
        }
        if let Some(longest) = borders.get_mut(at) {
            *longest = border;
        }
    }
    let period = len.saturating_sub(border);
    if period <= len / 2 { period } else { len }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(bytes: &[u8]) -> Option<Weakness> {
        weakness(&Key::new(bytes).unwrap())
    }

    #[test]
    fn fewer_than_sixteen_bytes_are_short() {
        assert_eq!(judged(b"short"), Some(Weakness::Short(5)));
        assert_eq!(judged(&[0; 15]), Some(Weakness::Short(15)));
    }

    #[test]
    fn simple_patterns_are_weak_keys() {
        let counting: Vec<u8> = (0..=255).collect();
        let word = [b"secret\n".as_slice(), &[0; 4089]].concat();
        let mut zeros_and_a_one = vec![0; 4096];
        zeros_and_a_one[77] = 1;
        for bytes in [
            vec![0; 16],
            vec![0; 4096],
            vec![b'a'; 512],
            b"abc".repeat(1000),
            b"passwordpassword".to_vec(),
            b"passwordpasswordpass".to_vec(),
            counting.repeat(16),
            counting[..251].repeat(16),
            counting[..32].to_vec(),
            counting.iter().rev().copied().collect(),
            b"0123456789abcdef".to_vec(),
            b"aaaaaaaaaaaaaaab".to_vec(),
            b"aaaaaaaabbbbbbbbccccccccdddddddd".to_vec(),
            word,
            zeros_and_a_one,
        ] {
            assert_eq!(judged(&bytes), Some(Weakness::Monotonous), "{bytes:?}");
        }
    }

    #[test]
    fn random_keys_and_lines_of_text_are_not_weak() {
        for text in ["a line of text that is a key\n", "correct horse battery staple", "Tr0ub4dor&3-and-more"] {
            assert_eq!(judged(text.as_bytes()), None, "{text}");
        }
        // The xorshift generator starts from many seeds: no key of sixteen random bytes may be
        // called weak.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        };
        for len in [16, 20, 32, 115, 512, 4096] {
            for _ in 0..(40_000 / len) {
                let bytes: Vec<u8> = (0..len).map(|_| random()).collect();
                assert_eq!(judged(&bytes), None, "{bytes:?}");
            }
        }
        // The same bytes in hexadecimal, and in Base64.
        let digits: String = (0..16).map(|_| format!("{:02x}", random())).collect();
        assert_eq!(judged(digits.as_bytes()), None, "{digits}");
    }
}
