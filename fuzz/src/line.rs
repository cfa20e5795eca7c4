//! What a guest writes to its serial line: anything.

use fence_common::serial::{LINE_REQUEST_LEN, LineReader, MAGIC, on_the_line};
use fence_common::wire::{DOMAIN_LEN, HOST_LIST, Op};

/// Checks that a line with these bytes has exactly the requests that stand on it, and that a good
/// request behind them is found.
///
/// # Panics
/// If something does not hold.
pub fn check(bytes: &[u8]) {
    let good = good();
    let line = [bytes, &good].concat();
    let mut reader = LineReader::default();
    let mut found = Vec::new();
    for (at, &byte) in line.iter().enumerate() {
        if let Some(request) = reader.push(byte) {
            let Some(begin) = (at + 1).checked_sub(LINE_REQUEST_LEN) else { unreachable!("a request before its end") };
            let whole = &line[begin..=at];
            assert!(is_whole(whole), "no request: {whole:02x?}");
            assert_eq!((request.op, request.domain), (whole[4], whole[6..70].try_into().unwrap_or([0; DOMAIN_LEN])));
            assert_eq!(request.seqno.get().to_le_bytes(), whole[70..]);
            assert!(request.hash_kind == 0 && request.address == [0; 28] && request.hash == [0; 64]);
            found.push(begin);
        }
    }
    let there: Vec<_> = (0..=bytes.len()).filter(|&begin| is_whole(&line[begin..begin + LINE_REQUEST_LEN])).collect();
    assert_eq!(found, there, "requests were lost or made up");
    assert_eq!(found.last(), Some(&bytes.len()), "the last request was lost");
    assert!(reader.skipped() <= bytes.len() as u64, "more stray bytes than there were");
    answered(bytes);
}

/// An answer of any bytes has the magic where clients look for it, and loses nothing.
fn answered(answer: &[u8]) {
    let line = on_the_line(answer);
    let Some(said) = line.strip_prefix(b"\0").and_then(|line| line.strip_prefix(&MAGIC)) else {
        unreachable!("no magic: {line:02x?}")
    };
    match (answer, said) {
        ([HOST_LIST, records @ .., result], said) => {
            let end = [&[0][..], &MAGIC, &[*result]].concat();
            assert_eq!(said.strip_suffix(&end[..]), Some(&[&[HOST_LIST], records].concat()[..]));
        }
        (answer, said) => assert_eq!(answer, said),
    }
}

/// The form of a request, in other words than the reader's.
fn is_whole(bytes: &[u8]) -> bool {
    let (text, seqno) = bytes[6..].split_at(DOMAIN_LEN);
    assert_eq!(seqno.len(), 4);
    let name = text.split(|byte| *byte == 0).next().unwrap_or_default();
    bytes.starts_with(&MAGIC)
        && Op::ALL.iter().any(|op| op.to_wire() == bytes[4])
        && bytes[5] == 0
        && name.len() < DOMAIN_LEN
        && name.iter().all(|byte| *byte >= b' ' && *byte != 0x7f)
        && text[name.len()..].iter().all(|byte| *byte == 0)
}

fn good() -> [u8; LINE_REQUEST_LEN] {
    let mut bytes = [0; LINE_REQUEST_LEN];
    bytes[..10].copy_from_slice(b"abba\x01\0vm-x");
    bytes[70..].copy_from_slice(&[0x8e, 0x1f, 6, 0]);
    bytes
}
