//! Requests that an earlier daemon had begun when it died.

use fence_common::ledger::RequestId;
use fence_common::wire::Op;
use fence_control::history::{Event, Record, Unfinished};

use super::unix_ms;
use crate::clock::Moment;

/// How far the claim of a request and its arrival may be apart, in milliseconds.
const APART: u64 = 60_000;

/// A claim that the daemon before has stored.
#[derive(Clone, Copy, Debug)]
pub struct Begun {
    /// When.
    pub at: Moment,
    /// Of which request.
    pub id: RequestId,
}

/// Those of `begun` that have no end in `records`, each with its time.
///
/// What was begun before the last start is that daemon's affair. `records` may be the last ones
/// only, without the last start. Then what ended before them is unknown. So is everything without
/// records: the daemon before may have had no history.
pub(super) fn unfinished(begun: &[Begun], records: &[Record]) -> Vec<(u64, Unfinished)> {
    let last_start = records.iter().rev().find(|one| matches!(one.event, Event::Started { .. }));
    let Some(first) = last_start.or(records.first()) else { return Vec::new() };
    let since = first.time_unix_ms.saturating_add(duration_ms(&first.event));
    let mut found = Vec::new();
    let begun = begun.iter().map(|one| (unix_ms(one.at), one));
    for (begun_at, one) in begun.filter(|(at, _)| *at >= since) {
        let Some(request) = parts(&one.id) else { continue };
        let ended = records.iter().any(|record| match &record.event {
            Event::Request(ended) => {
                let domain = ended.domain.as_deref().unwrap_or_default();
                ended.seqno == request.seqno
                    && ended.op == request.op
                    && domain.eq_ignore_ascii_case(&request.domain)
                    && record.time_unix_ms.abs_diff(begun_at) < APART
            }
            Event::Unfinished(_) | Event::Unsigned(_) | Event::Started { .. } | Event::Lost { .. } => false,
        });
        if !ended {
            found.push((begun_at, request));
        }
    }
    found
}

/// How long a request took, until its line was written.
fn duration_ms(event: &Event) -> u64 {
    match event {
        Event::Request(ended) => ended.steps.ended_us.unwrap_or_default().div_ceil(1000),
        Event::Unfinished(_) | Event::Unsigned(_) | Event::Started { .. } | Event::Lost { .. } => 0,
    }
}

/// What a claim says of its request.
fn parts(id: &RequestId) -> Option<Unfinished> {
    let [op, a, b, c, d, domain @ ..] = id.to_bytes();
    let end = domain.iter().position(|byte| *byte == 0).unwrap_or(domain.len());
    let domain = String::from_utf8_lossy(domain.get(..end)?).escape_debug().to_string();
    Some(Unfinished { op: Op::from_wire(op)?.name().to_owned(), domain, seqno: u32::from_le_bytes([a, b, c, d]) })
}

#[cfg(test)]
mod tests {
    use fence_common::wire::Request;
    use fence_control::history::Asked;
    use std::time::Duration;
    use zerocopy::FromZeros as _;

    use super::*;

    fn begun(seqno: u32, at: Moment) -> Begun {
        let mut request = Request::new_zeroed();
        request.seqno = seqno.into();
        request.domain[..5].copy_from_slice(b"Node1");
        Begun { at, id: RequestId::of(Op::Off, &request) }
    }

    fn ended(seqno: u32, time_unix_ms: u64) -> Record {
        let text = str::to_owned;
        let asked = Asked {
            op: text("off"),
            domain: Some(text("Node1")),
            client: text("192.168.122.11:1229"),
            seqno,
            via: text("kernel"),
            listener: None,
            result: text("success"),
            detail: text("was running"),
            steps: fence_control::report::Steps::default(),
        };
        Record { id: 1, time_unix_ms, event: Event::Request(asked) }
    }

    #[test]
    fn a_claim_without_an_end_was_not_finished() {
        let now = Moment::now();
        let (first, second) = (now.before(Duration::from_secs(9)), now.before(Duration::from_secs(5)));
        let (first_ms, begun) = (unix_ms(first), [begun(7, first), begun(8, second)]);
        let found =
            |records: &[Record]| unfinished(&begun, records).into_iter().map(|(_, one)| one.seqno).collect::<Vec<_>>();
        let started =
            |time_unix_ms| Record { id: 3, time_unix_ms, event: Event::Started { version: String::new(), pid: 1 } };
        let start = started(first_ms - 9000);
        assert_eq!(found(std::slice::from_ref(&start)), [7, 8]);
        assert_eq!(found(&[start.clone(), ended(7, first_ms - 10)]), [8]);
        // The number was used before, by another request.
        assert_eq!(found(&[ended(7, first_ms - 2 * APART), start.clone()]), [7, 8]);
        assert_eq!(found(&[start.clone(), started(first_ms + 2000)]), [8]);
        // What ended before the first line that is known is not unfinished.
        assert_eq!(found(&[]), [0; 0]);
        let mut slow = ended(1, first_ms - 100);
        if let Event::Request(asked) = &mut slow.event {
            asked.steps.ended_us = Some(2_000_000);
        }
        assert_eq!(found(&[slow]), [8]);
        let (at, one) = unfinished(&begun[..1], &[start]).remove(0);
        assert!(at.abs_diff(first_ms) < 1000 && (one.op.as_str(), one.domain.as_str()) == ("off", "node1"), "{one:?}");
    }
}
