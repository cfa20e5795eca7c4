//! The bytes of a serial line, as Debian 12's `fence_virt` 4.12.1 sends and reads them.
//!
//! A request has 74 bytes and no digest: the line itself says which domain asks. Other programs of
//! the guest may write to the line as well, such as a boot console. So a request is whatever 74
//! bytes in a row have the form of one, wherever they begin.

use alloc::vec::Vec;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian};

use crate::wire::{DOMAIN_LEN, HOST_LIST, Op, Request};

/// What each request and each answer begins with: "abba".
pub const MAGIC: [u8; 4] = *b"abba";

/// Length of a request on the line in bytes.
pub const LINE_REQUEST_LEN: usize = 74;

/// A request on the line. Any 74 bytes are one.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct LineRequest {
    magic: [u8; 4],
    op: u8,
    flags: u8,
    domain: [u8; DOMAIN_LEN],
    seqno: little_endian::U32,
}

impl LineRequest {
    /// Whether a client can have sent it. Being strict keeps other output from being taken for a
    /// request: text has no byte that names an operation.
    fn is_whole(&self) -> bool {
        if self.magic != MAGIC || Op::from_wire(self.op).is_none() || self.flags != 0 {
            return false;
        }
        let Some(end) = self.domain.iter().position(|&byte| byte == 0) else { return false };
        let (text, padding) = self.domain.split_at(end);
        !text.iter().any(u8::is_ascii_control) && padding.iter().all(|&byte| byte == 0)
    }
}

/// Finds requests in what a line sends.
///
/// It keeps the last 74 bytes and looks at them after each new one. So nothing that comes before a
/// request can hide it, and each byte costs the same.
#[derive(Debug)]
pub struct LineReader {
    /// The last bytes as a ring: the oldest one is at `oldest`. The zeros of the start are no
    /// magic.
    ring: [u8; LINE_REQUEST_LEN],
    oldest: usize,
    /// Bytes since the last request, or since the start.
    since: u64,
    /// Bytes that belonged to no request.
    skipped: u64,
}

impl Default for LineReader {
    fn default() -> Self {
        Self { ring: [0; LINE_REQUEST_LEN], oldest: 0, since: 0, skipped: 0 }
    }
}

impl LineReader {
    /// Takes in a byte. Returns the request that it completes, in the form of a datagram whose
    /// other fields are zero: it has neither digest nor address.
    pub fn push(&mut self, byte: u8) -> Option<Request> {
        let Self { ring, oldest, since, .. } = self;
        if let Some(place) = ring.get_mut(*oldest) {
            *place = byte;
        }
        *oldest = (*oldest + 1) % LINE_REQUEST_LEN;
        *since += 1;
        // A cheap look, which almost every byte fails.
        let begins = MAGIC.iter().enumerate().all(|(at, byte)| {
            let place = (*oldest + at) % LINE_REQUEST_LEN;
            ring.get(place) == Some(byte)
        });
        if !begins {
            return None;
        }
        let mut bytes = *ring;
        bytes.rotate_left(*oldest);
        let line = LineRequest::read_from_bytes(&bytes).ok().filter(LineRequest::is_whole)?;
        self.skipped += since.saturating_sub(LINE_REQUEST_LEN as u64);
        *since = 0;
        let mut request = Request::read_from_bytes(&[0; size_of::<Request>()]).ok()?;
        (request.op, request.domain, request.seqno) = (line.op, line.domain, line.seqno);
        Some(request)
    }

    /// How many bytes belonged to no request so far. The last 73 may still become one.
    #[must_use]
    pub fn skipped(&self) -> u64 {
        self.skipped + self.since.saturating_sub(LINE_REQUEST_LEN as u64 - 1)
    }
}

/// An answer of other listeners in the form of the line: the magic is before the reply, and before
/// the last byte of a host list once more.
///
/// A zero byte comes before each magic. A stock client that has seen half a magic in stray bytes
/// overlooks the one that follows at once. It skips the zero.
#[must_use]
pub fn on_the_line(answer: &[u8]) -> Vec<u8> {
    let mut line = Vec::with_capacity(answer.len() + 2 * (1 + MAGIC.len()));
    let mut part = |bytes: &[u8]| {
        line.push(0);
        line.extend_from_slice(&MAGIC);
        line.extend_from_slice(bytes);
    };
    match answer {
        [HOST_LIST, records @ .., result] => {
            part(&[&[HOST_LIST], records].concat());
            part(&[*result]);
        }
        answer => part(answer),
    }
    line
}

#[cfg(test)]
mod tests {
    use std::vec;

    use proptest::prelude::*;

    use super::*;
    use crate::wire::{HostRecord, Reply};

    fn line(op: u8, domain: &str, seqno: u32) -> Vec<u8> {
        let mut field = [0; DOMAIN_LEN];
        field[..domain.len()].copy_from_slice(domain.as_bytes());
        LineRequest { magic: MAGIC, op, flags: 0, domain: field, seqno: seqno.into() }.as_bytes().to_vec()
    }

    fn found(bytes: &[u8]) -> (Vec<(u8, Vec<u8>, u32)>, u64) {
        let mut reader = LineReader::default();
        let requests = bytes.iter().filter_map(|&byte| reader.push(byte));
        let requests = requests
            .map(|request| (request.op, request.domain_text().unwrap().to_vec(), request.seqno.get()))
            .collect();
        (requests, reader.skipped())
    }

    #[test]
    fn the_bytes_are_those_of_the_stock_client() {
        // As captured: `fence_virt -D DEVICE -o off -H vm-x`.
        let mut captured = b"abba\x01\0vm-x".to_vec();
        captured.resize(70, 0);
        captured.extend([0x8e, 0x1f, 0x06, 0x00]);
        assert_eq!(captured, line(1, "vm-x", 0x0006_1f8e));
        assert_eq!(found(&captured), (vec![(1, b"vm-x".to_vec(), 0x0006_1f8e)], 0));
    }

    #[test]
    fn what_no_client_sends_is_no_request() {
        let good = line(1, "vm-x", 7);
        for (at, byte) in [(0, b'b'), (3, 0), (4, 7), (4, b'o'), (5, 1), (7, b'\n'), (7, 0x7f), (11, b'x'), (69, 1)] {
            let mut bad = good.clone();
            bad[at] = byte;
            assert_eq!(found(&bad).0, [], "{byte} at {at}");
        }
        let endless = line(1, &"x".repeat(DOMAIN_LEN), 7);
        assert_eq!(found(&endless).0, []);
        assert_eq!(found(&line(1, &"x".repeat(DOMAIN_LEN - 1), 7)).0.len(), 1);
    }

    #[test]
    fn an_interrupted_request_does_not_hide_the_next() {
        let good = line(2, "vm-x", 0x6261_6261);
        for cut in 0..=good.len() {
            let mut bytes = good[..cut].to_vec();
            bytes.extend_from_slice(&good);
            let (requests, _) = found(&bytes);
            assert!(requests.contains(&(2, b"vm-x".to_vec(), 0x6261_6261)), "cut after {cut}");
        }
    }

    #[test]
    fn stray_bytes_are_counted() {
        assert_eq!(found(&[b'a'; 1000]).1, 1000 - 73);
        let bytes = [&b"login: a"[..], &line(4, "vm", 1), b"abba", &line(4, "vm", 2)].concat();
        assert_eq!((found(&bytes).0.len(), found(&bytes).1), (2, 12));
    }

    #[test]
    fn answers_have_a_magic_where_stock_clients_look_for_it() {
        assert_eq!(on_the_line(&[Reply::Off.to_wire()]), b"\0abba\x02");
        let record = HostRecord::new("vm", "u", 1);
        let list = [&[HOST_LIST][..], record.as_bytes(), HostRecord::END.as_bytes(), &[0]].concat();
        let sent = on_the_line(&list);
        assert_eq!((sent.len(), &sent[..6]), (2 + 5 + 2 * 130 + 5, &b"\0abba\xfd"[..]));
        assert_eq!(sent[6 + 260..], *b"\0abba\0");
    }

    proptest! {
        #[test]
        fn garbage_never_loses_a_request_that_follows(
            parts in proptest::collection::vec(
                (proptest::collection::vec(prop_oneof![Just(b'a'), Just(b'b'), 0..8_u8, any::<u8>()], 0..200), 0..7_u8, any::<u32>()),
                1..6,
            ),
        ) {
            let mut bytes = Vec::new();
            for (garbage, op, seqno) in &parts {
                bytes.extend_from_slice(garbage);
                bytes.extend(line(*op, "vm-x", *seqno));
            }
            let (requests, skipped) = found(&bytes);
            let mut requests = requests.into_iter();
            for (_, op, seqno) in &parts {
                let wanted = (*op, b"vm-x".to_vec(), *seqno);
                prop_assert!(requests.any(|request| request == wanted), "{wanted:?} was lost");
            }
            prop_assert!(skipped <= parts.iter().map(|(garbage, ..)| garbage.len() as u64).sum());
        }
    }
}
