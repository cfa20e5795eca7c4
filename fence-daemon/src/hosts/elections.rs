//! Who waits on this host to call a client back.
//!
//! A client with several addresses sends a copy of its request for each. All copies are one request
//! to the other hosts: the elected host calls each address back, and one that answers is enough.

use std::collections::BTreeMap;
use std::time::Duration;

use fence_common::ledger::RequestId;
use tokio::sync::oneshot;

use crate::clock::Moment;

/// How long an elected host serves further copies of a request.
const KEPT: Duration = Duration::from_secs(10);

/// The requests that copies wait for, or that this host is elected for.
#[derive(Debug, Default)]
pub(super) struct Elections(BTreeMap<RequestId, Copies>);

#[derive(Debug, Default)]
struct Copies {
    waiting: Vec<oneshot::Sender<bool>>,
    /// Until when this host is elected.
    elected: Option<Moment>,
    /// How many copies are being called back.
    calling: usize,
    is_reached: bool,
}

impl Elections {
    /// A copy waits. Whether the other hosts have to be asked: not if this host is elected.
    pub(super) fn wait(&mut self, now: Moment, request: RequestId, copy: oneshot::Sender<bool>) -> bool {
        self.expire(now);
        let copies = self.0.entry(request).or_default();
        if copies.elected.is_none() {
            copies.waiting.push(copy);
            return true;
        }
        copies.calling += usize::from(copy.send(true).is_ok());
        false
    }

    /// The hosts have decided: this one calls back, and if `is_certain` no other does. Returns
    /// whether a copy still waits for that.
    pub(super) fn decide(&mut self, now: Moment, request: RequestId, is_certain: bool) -> bool {
        let Some(copies) = self.0.get_mut(&request) else { return false };
        let waiting = std::mem::take(&mut copies.waiting);
        let taken = waiting.into_iter().map(|copy| usize::from(copy.send(is_certain).is_ok())).sum();
        if is_certain && taken > 0 {
            copies.elected = Some(now.plus(KEPT));
            copies.calling = taken;
        } else {
            self.0.remove(&request);
        }
        taken > 0
    }

    /// A copy was called back. What the other hosts are to know, if anything: whether the client
    /// was reached.
    pub(super) fn called(&mut self, request: RequestId, reached: bool) -> Option<bool> {
        let copies = self.0.get_mut(&request)?;
        copies.calling = copies.calling.saturating_sub(1);
        if reached {
            return (!std::mem::replace(&mut copies.is_reached, true)).then_some(true);
        }
        if copies.calling > 0 || copies.is_reached {
            return None;
        }
        self.0.remove(&request);
        Some(false)
    }

    /// Everything that waits is left to the time: there is no group to decide.
    pub(super) fn clear(&mut self) {
        for copy in std::mem::take(&mut self.0).into_values().flat_map(|copies| copies.waiting) {
            // One that has given up waits no more.
            let _ = copy.send(false);
        }
    }

    fn expire(&mut self, now: Moment) {
        self.0.retain(|_, copies| {
            copies.waiting.retain(|copy| !copy.is_closed());
            match copies.elected {
                Some(until) => until > now || copies.calling > 0,
                None => !copies.waiting.is_empty(),
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use fence_common::wire::{Op, Request};
    use zerocopy::FromZeros as _;

    use super::*;

    #[test]
    fn all_copies_are_called_back_and_one_that_is_reached_is_enough() {
        let (now, request) = (Moment::now(), RequestId::of(Op::Off, &Request::new_zeroed()));
        let mut elections = Elections::default();
        let copy = |elections: &mut Elections, now| {
            let (copy, decided) = oneshot::channel();
            (elections.wait(now, request, copy), decided)
        };
        let (first, second) = (copy(&mut elections, now), copy(&mut elections, now));
        assert!(first.0 && second.0 && elections.decide(now, request, true));
        let third = copy(&mut elections, now);
        assert!(!third.0, "this host is elected already");
        for (_, mut decided) in [first, second, third] {
            assert_eq!(decided.try_recv(), Ok(true));
        }
        assert_eq!(elections.called(request, false), None, "another address may answer");
        assert_eq!(elections.called(request, true), Some(true));
        assert_eq!(elections.called(request, false), None);
        // Long after that the hosts elect again.
        let (asks, decided) = copy(&mut elections, now.plus(KEPT));
        assert!(asks);
        // It has given up meanwhile, so another host has to be elected.
        drop(decided);
        assert!(!elections.decide(now.plus(KEPT), request, true));
        let (_, mut decided) = copy(&mut elections, now.plus(KEPT));
        assert!(elections.decide(now.plus(KEPT), request, true) && decided.try_recv() == Ok(true));
        assert_eq!(elections.called(request, false), Some(false), "nobody was reached");
        let (_, mut decided) = copy(&mut elections, now.plus(KEPT));
        elections.clear();
        assert_eq!(decided.try_recv(), Ok(false));
    }
}
