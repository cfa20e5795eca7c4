//! When was a message sent, at the earliest? Beats answer it, without comparing two clocks.
//!
//! Each daemon sends a beat through the group about every second. Each message names the last beat
//! that its sender had heard, of whomever. The receiver has heard that beat as well, in the same
//! place of the one order. Its own beat before that place came from itself, at a moment that it
//! knows. So the message is younger than that moment.
//!
//! This covers all that may hold a message back: a daemon that was stopped or swapped out, a
//! corosync that was, and the queue of a sender whose host was cut off. A beat's number begins with
//! a random one, so that two lives of a daemon do not share numbers.
//!
//! A beat also has its sender's clock and software version, for people alone: beats are not signed.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::super::transport::{ClockGap, Member, Software, Vitals};
use crate::clock::Moment;

/// How long a message's header is, in bytes: version, kind, two zeros, and the last heard beat
/// (node, number), little-endian.
pub(super) const HEADER: usize = 16;
/// How long a beat is: a header, its own number, the wall clock in milliseconds since 1970, the
/// three numbers of the software's version (16 bits each), and two zeros.
pub(super) const BEAT: usize = HEADER + 8 + 8 + 8;
/// The version of the frames.
const VERSION: u8 = 1;
/// Kinds of frames.
const MESSAGE: u8 = 0;
const BEAT_KIND: u8 = 1;
/// How many beats are remembered: two minutes of 32 hosts.
const REMEMBERED: usize = 4096;
/// How many of one's own beats may be on their way.
const ON_THEIR_WAY: usize = 256;

/// A beat's name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Id {
    node: u32,
    number: u64,
}

/// What a frame says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum GroupFrame<'a> {
    /// A message, and when it was sent at the earliest.
    Message(Option<Moment>, &'a [u8]),
    /// One's own beat, and how long it took.
    Own(Duration),
    /// Another one's beat, and what it says of its host.
    Other(Vitals),
}

/// The beats of one membership.
#[derive(Debug)]
pub(super) struct GroupBeats {
    ours: Member,
    next: u64,
    /// One's own beats that have not come back, and when they were sent.
    sent: VecDeque<(u64, Moment)>,
    /// The beats in their order, each with when one's own last beat up to it was sent.
    heard: VecDeque<(Id, Option<Moment>)>,
    /// When one's own last heard beat was sent.
    floor: Option<Moment>,
}

impl GroupBeats {
    /// The beats of `ours`, whose numbers begin with `first`, a random one.
    pub(super) fn new(ours: Member, first: u64) -> Self {
        // Number 0 with node 0 stands for "none heard".
        Self { ours, next: first.max(1), sent: VecDeque::new(), heard: VecDeque::new(), floor: None }
    }

    /// What stands before a message that is sent now.
    pub(super) fn header(&self) -> [u8; HEADER] {
        self.frame(MESSAGE)
    }

    /// The next beat. `now` is before it is sent, and `wall` the wall clock then.
    pub(super) fn beat(&mut self, now: Moment, wall: SystemTime) -> [u8; BEAT] {
        if self.sent.len() == ON_THEIR_WAY {
            self.sent.pop_front();
        }
        self.sent.push_back((self.next, now));
        let mut frame = [0; BEAT];
        let [major, minor, patch] = Software::OURS.0.map(u16::to_le_bytes);
        let millis = since_1970(wall).to_le_bytes();
        let parts: [&[u8]; 6] = [&self.frame(BEAT_KIND), &self.next.to_le_bytes(), &millis, &major, &minor, &patch];
        for (place, byte) in frame.iter_mut().zip(parts.concat()) {
            *place = byte;
        }
        self.next = self.next.wrapping_add(1).max(1);
        frame
    }

    fn frame(&self, kind: u8) -> [u8; HEADER] {
        let last = self.heard.back().map(|(id, _)| *id).unwrap_or_default();
        let mut frame = [0; HEADER];
        frame[0] = VERSION;
        frame[1] = kind;
        frame[4..8].copy_from_slice(&last.node.to_le_bytes());
        frame[8..].copy_from_slice(&last.number.to_le_bytes());
        frame
    }

    /// How long the oldest beat on its way has been so.
    pub(super) fn oldest(&self, now: Moment) -> Option<Duration> {
        self.sent.front().map(|(_, sent)| now.since(*sent))
    }

    /// A frame came at `now`, or `wall` by the wall clock. `None`: it is of another version, or
    /// cut.
    pub(super) fn hear<'a>(
        &mut self,
        from: Member,
        frame: &'a [u8],
        now: Moment,
        wall: SystemTime,
    ) -> Option<GroupFrame<'a>> {
        let (header, rest) = frame.split_first_chunk::<HEADER>()?;
        let node = u32::from_le_bytes(header[4..8].try_into().ok()?);
        let last = Id { node, number: u64::from_le_bytes(header[8..].try_into().ok()?) };
        let place = self.heard.iter().rev().find(|(id, _)| *id == last);
        let sent_after = place.and_then(|(_, floor)| *floor);
        match (header[0], header[1]) {
            (VERSION, MESSAGE) => Some(GroupFrame::Message(sent_after, rest)),
            (VERSION, BEAT_KIND) => {
                let ([its_number, clock, [a, b, c, d, e, f, _, _]], []) = rest.as_chunks::<8>() else { return None };
                let id = Id { node: from.node, number: u64::from_le_bytes(*its_number) };
                let software = Software([[*a, *b], [*c, *d], [*e, *f]].map(u16::from_le_bytes));
                let clock =
                    sent_after.map(|sent| ClockGap::new(u64::from_le_bytes(*clock), since_1970(wall), now.since(sent)));
                let vitals = Vitals { software, clock };
                let took = (from == self.ours).then(|| self.come_back(id.number, now)).flatten();
                if self.heard.len() == REMEMBERED {
                    self.heard.pop_front();
                }
                self.heard.push_back((id, self.floor));
                Some(took.map_or(GroupFrame::Other(vitals), GroupFrame::Own))
            }
            _ => None,
        }
    }

    /// One's own beat came back: how long it took.
    fn come_back(&mut self, number: u64, now: Moment) -> Option<Duration> {
        let place = self.sent.iter().position(|(sent, _)| *sent == number)?;
        let (_, sent) = self.sent.drain(..=place).next_back()?;
        self.floor = Some(sent);
        Some(now.since(sent))
    }
}

/// The wall clock in milliseconds since 1970.
fn since_1970(wall: SystemTime) -> u64 {
    let since = wall.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Member = Member { node: 1, pid: 10 };
    const B: Member = Member { node: 2, pid: 10 };

    fn at(seconds: u64) -> Moment {
        Moment::from_ktime(seconds * 1_000_000_000)
    }

    fn wall(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds)
    }

    /// A beat of a clock that is right.
    fn beat_at(beats: &mut GroupBeats, now: u64) -> [u8; BEAT] {
        beats.beat(at(now), wall(now))
    }

    fn hear_at<'a>(beats: &mut GroupBeats, from: Member, frame: &'a [u8], now: u64) -> Option<GroupFrame<'a>> {
        beats.hear(from, frame, at(now), wall(now))
    }

    fn message(beats: &GroupBeats, text: &[u8]) -> Vec<u8> {
        [&beats.header()[..], text].concat()
    }

    fn sent_after(heard: Option<GroupFrame<'_>>) -> Option<Moment> {
        let Some(GroupFrame::Message(moment, _)) = heard else { panic!("{heard:?}") };
        moment
    }

    /// Both hear each frame, in this order.
    fn both(a: &mut GroupBeats, b: &mut GroupBeats, from: Member, frame: &[u8], now: u64) {
        hear_at(a, from, frame, now);
        hear_at(b, from, frame, now);
    }

    #[test]
    fn a_message_is_younger_than_the_receivers_beat_before_it() {
        let (mut a, mut b) = (GroupBeats::new(A, 100), GroupBeats::new(B, 7));
        assert_eq!(sent_after(hear_at(&mut b, A, &message(&a, b"x"), 1)), None, "nobody has heard a beat");
        let beat = beat_at(&mut b, 10);
        both(&mut a, &mut b, B, &beat, 11);
        let early = message(&a, b"early");
        // The receiver hears it a minute later: its age is known all the same.
        assert_eq!(sent_after(hear_at(&mut b, A, &early, 70)), Some(at(10)));
        // Another one's beat is a place as well.
        let others = beat_at(&mut a, 12);
        both(&mut a, &mut b, A, &others, 12);
        assert_eq!(sent_after(hear_at(&mut b, A, &message(&a, b"x"), 71)), Some(at(10)));
        let beat = beat_at(&mut b, 20);
        both(&mut a, &mut b, B, &beat, 21);
        assert_eq!(sent_after(hear_at(&mut b, A, &message(&a, b"late"), 22)), Some(at(20)));
        // One that waited in the sender's queue meanwhile does not become younger.
        assert_eq!(sent_after(hear_at(&mut b, A, &early, 72)), Some(at(10)));
        assert_eq!(hear_at(&mut b, A, &message(&a, b"text"), 72), Some(GroupFrame::Message(Some(at(20)), b"text")));
    }

    #[test]
    fn an_unknown_place_is_no_moment() {
        let (mut a, mut b) = (GroupBeats::new(A, 100), GroupBeats::new(B, 7));
        let beat = beat_at(&mut b, 1);
        hear_at(&mut b, B, &beat, 1);
        // `a` heard a beat in another membership, and `b` a beat of a former life of that daemon.
        let elsewhere = beat_at(&mut a, 1);
        hear_at(&mut a, A, &elsewhere, 1);
        let former = beat_at(&mut GroupBeats::new(A, 9), 1);
        hear_at(&mut b, A, &former, 1);
        assert_eq!(sent_after(hear_at(&mut b, A, &message(&a, b"x"), 2)), None);
        for _ in 0..REMEMBERED + 10 {
            let beat = beat_at(&mut b, 5);
            hear_at(&mut b, B, &beat, 5);
        }
        assert_eq!(b.heard.len(), REMEMBERED);
        assert!(b.oldest(at(9)).is_none());
    }

    #[test]
    fn ones_own_beat_tells_how_long_it_took() {
        let mut a = GroupBeats::new(A, u64::MAX);
        let (first, second) = (beat_at(&mut a, 1), beat_at(&mut a, 2));
        assert_eq!(a.oldest(at(4)), Some(Duration::from_secs(3)));
        assert_eq!(hear_at(&mut a, A, &first, 5), Some(GroupFrame::Own(Duration::from_secs(4))));
        assert_eq!(a.oldest(at(5)), Some(Duration::from_secs(3)));
        // A beat that was lost is passed over.
        let third = beat_at(&mut a, 6);
        assert_eq!(hear_at(&mut a, A, &third, 6), Some(GroupFrame::Own(Duration::ZERO)));
        assert_eq!(a.oldest(at(7)), None);
        assert!(matches!(hear_at(&mut a, A, &second, 7), Some(GroupFrame::Other(_))));
        // A second daemon of this host is another one.
        let other = Member { node: 1, pid: 11 };
        assert!(matches!(hear_at(&mut a, other, &third, 8), Some(GroupFrame::Other(_))));
    }

    #[test]
    fn a_beat_tells_of_its_hosts_version_and_clock() {
        let (mut a, mut b) = (GroupBeats::new(A, 100), GroupBeats::new(B, 7));
        let vitals = |heard: Option<GroupFrame<'_>>| match heard {
            Some(GroupFrame::Other(vitals)) => vitals,
            other => panic!("{other:?}"),
        };
        let first = beat_at(&mut a, 9);
        let told = vitals(hear_at(&mut b, A, &first, 9));
        assert_eq!((told.software, told.clock), (Software::OURS, None), "nobody knows how old it is");
        let known = beat_at(&mut b, 10);
        both(&mut a, &mut b, B, &known, 10);
        let ahead =
            |b: &mut GroupBeats, frame: &[u8], now| vitals(hear_at(b, A, frame, now)).clock.map(ClockGap::ahead_ms);
        let right = beat_at(&mut a, 10);
        assert_eq!(ahead(&mut b, &right, 11), Some(0), "it may have taken the second");
        let early = a.beat(at(11), wall(16));
        assert_eq!(ahead(&mut b, &early, 11), Some(5_000));
        // It is 2 s old at most, and its clock 12 s behind.
        let late = a.beat(at(12), wall(0));
        assert_eq!(ahead(&mut b, &late, 12), Some(-10_000));
    }

    #[test]
    fn what_is_cut_or_new_is_no_frame() {
        let mut a = GroupBeats::new(A, 5);
        let beat = beat_at(&mut a, 1);
        assert_eq!(hear_at(&mut a, B, &beat[..HEADER - 1], 1), None);
        assert_eq!(hear_at(&mut a, B, &beat[..BEAT - 1], 1), None);
        for (place, value) in [(0, 2), (1, 2)] {
            let mut other = beat;
            other[place] = value;
            assert_eq!(hear_at(&mut a, B, &other, 1), None);
        }
    }
}
