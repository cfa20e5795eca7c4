//! Decides the answer to an authenticated request: permission, the action, and the words for client
//! and log.

use std::time::Duration;

use fence_common::ending::Ending;
use fence_common::wire::{HOST_LIST, HostRecord, Op, Reply};
use fence_common::words::counted;
use tokio::time::Instant;
use uuid::Uuid;
use zerocopy::IntoBytes;

use super::stop::{Stopping, stopped};
use super::{ANSWER_WITHIN, Shared};
use crate::callback::Authenticated;
use crate::clock::Moment;
use crate::hosts::{SharedDomain, Verdict};
use crate::hypervisor::{Deadline, Foresight, Requester};
use crate::intake::request::Verified;
use crate::policy::{self, Authorized, Denied};

/// How long `monitor` waits for a connection to a libvirt that restarts. Its client waits for 30 s,
/// and Pacemaker for 20 s.
const RENEWAL: Duration = Duration::from_secs(8);

/// The most domains that a list names in the log.
const PLACES_MAX: usize = 20;

/// The kind of log line that an answer makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tone {
    /// A domain was fenced or started, or was already as it should be. Always logged.
    Done,
    /// A question. Logged unless it comes too often.
    Asked,
    /// No group, no such domain, no success. A warning with the reason, unless it comes too often.
    Refused,
}

/// What is said to the peer in the end.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) bytes: Vec<u8>,
    pub(super) result: Ending,
    pub(super) detail: String,
    pub(super) dead: Option<Moment>,
    pub(super) tone: Tone,
}

impl Answer {
    /// A request that nothing is done about.
    pub(super) fn refused(reply: Reply, detail: impl Into<String>) -> Self {
        Self::reply(reply, detail, Tone::Refused)
    }

    fn reply(reply: Reply, detail: impl Into<String>, tone: Tone) -> Self {
        Self { bytes: vec![reply.to_wire()], result: reply.into(), detail: detail.into(), dead: None, tone }
    }

    fn verdict(op: Op, verdict: Verdict) -> Self {
        let Verdict { reply, proven_off, detail, is_known } = verdict;
        let tone = match (op, reply) {
            _ if !is_known => Tone::Refused,
            (Op::Status, Reply::Success | Reply::Off) => Tone::Asked,
            (_, Reply::Success) => Tone::Done,
            (_, Reply::Failure | Reply::Off | Reply::PermissionDenied) => Tone::Refused,
        };
        Self { dead: proven_off, ..Self::reply(reply, detail, tone) }
    }
}

/// What a peer may have of what it asks.
#[derive(Debug)]
pub(super) enum Permitted {
    /// An answer that changes nothing and that any client may have.
    Question,
    /// An operation on a domain.
    Order(Authorized),
}

impl Shared {
    /// What the peer may have. It is decided before the claim, so that a denial costs other copies
    /// nothing.
    ///
    /// # Errors
    /// The answer to a peer that may have nothing.
    pub(super) fn permit(&self, peer: &Authenticated) -> Result<Permitted, Answer> {
        if !peer.request().op().names_a_domain() {
            return Ok(Permitted::Question);
        }
        policy::authorize(&self.groups.now(), peer).map(Permitted::Order).map_err(|denied| {
            let reply = match denied {
                Denied::NoDomain => Reply::Failure,
                Denied::NotInAGroup { .. } | Denied::NotAtThisListener { .. } | Denied::NotWithThisKey { .. } => {
                    Reply::PermissionDenied
                }
            };
            Answer::refused(reply, denied.to_string())
        })
    }

    /// The answer. It is a failure if the daemon stops before the answer is there.
    pub(super) async fn answer(
        &self,
        peer: &Authenticated,
        permitted: Permitted,
        foresight: Option<Foresight>,
        stopping: &mut Stopping,
    ) -> Answer {
        let left = ANSWER_WITHIN.saturating_sub(Moment::now().since(peer.request().arrived()));
        let deadline = Deadline::at(Instant::now() + left);
        tokio::select! {
            biased;
            answer = self.whole_answer(peer, permitted, foresight, &deadline) => answer,
            () = stopped(stopping) => {
                // The claim is on record, so the next daemon does not act again; what has begun
                // takes effect.
                deadline.call_off();
                Answer::refused(Reply::Failure, "the daemon stops before this was done; what has begun goes on")
            }
        }
    }

    async fn whole_answer(
        &self,
        peer: &Authenticated,
        permitted: Permitted,
        foresight: Option<Foresight>,
        deadline: &Deadline,
    ) -> Answer {
        match (permitted, peer.request().op()) {
            (Permitted::Order(order), _) => self.carry_out(order, peer.request(), foresight, deadline).await,
            (Permitted::Question, Op::DevStatus) => self.monitor(peer, deadline).await,
            (Permitted::Question, Op::HostList) => self.host_list(peer, deadline).await,
            (Permitted::Question, Op::Null | Op::Off | Op::Reboot | Op::On | Op::Status) => {
                Answer::reply(Reply::Failure, "null is always answered with failure", Tone::Asked)
            }
        }
    }

    async fn carry_out(
        &self,
        order: Authorized,
        request: &Verified,
        foresight: Option<Foresight>,
        deadline: &Deadline,
    ) -> Answer {
        let requester = Requester {
            caller: request.caller(),
            domain: request.who().domain.map(|domain| domain.uuid),
            interface: request.endpoint().interface,
            arrived: request.arrived(),
        };
        if deadline.by() <= Instant::now() {
            return Answer::refused(Reply::Failure, "the callback took too long: nothing was done");
        }
        let (op, id) = (order.op(), request.id());
        let (hypervisors, hosts) = (self.hypervisors.clone(), self.hosts.clone());
        // A task of its own: when the answer is overdue the client receives a failure, and what has
        // begun takes effect.
        let action = tokio::spawn({
            let deadline = deadline.clone();
            async move {
                match hosts {
                    Some(hosts) => hosts.carry_out(&hypervisors, &order, id, Some(requester), &deadline).await,
                    None => {
                        let outcome = hypervisors.carry_out_foreseen(&order, Some(requester), foresight, &deadline);
                        Verdict::from(&outcome.await)
                    }
                }
            }
        });
        match tokio::time::timeout_at(deadline.by(), action).await {
            Ok(Ok(verdict)) => Answer::verdict(op, verdict),
            Ok(Err(_)) => Answer::refused(Reply::Failure, "the action broke off: a bug of fence-xdp"),
            Err(_) => {
                deadline.call_off();
                Answer::refused(
                    Reply::Failure,
                    format!("not done {} s after it was asked; what was begun goes on", ANSWER_WITHIN.as_secs()),
                )
            }
        }
    }

    async fn monitor(&self, peer: &Authenticated, deadline: &Deadline) -> Answer {
        if !self.hypervisors.any_connected_within(RENEWAL).await {
            return Answer::refused(Reply::Failure, "no hypervisor is connected");
        }
        let Some(hosts) = &self.hosts else {
            return Answer::reply(Reply::Success, "a hypervisor is connected", Tone::Asked);
        };
        match hosts.monitor(peer.request().id(), deadline.by()).await {
            Ok(()) => Answer::reply(Reply::Success, "every configured host is well", Tone::Asked),
            Err(why) => Answer::refused(Reply::Failure, why),
        }
    }

    async fn host_list(&self, peer: &Authenticated, deadline: &Deadline) -> Answer {
        // A shorter list would be worse than none: a cluster would drop the missing domains from
        // its targets.
        if let Some(hosts) = &self.hosts {
            return match hosts.list(peer.request().id(), deadline.by()).await {
                Ok(domains) => {
                    let all = domains.iter().map(|SharedDomain { domain, .. }| domain);
                    let mut answer = self.listed(peer, all.map(|one| (one.name.as_str(), one.uuid, one.state)));
                    answer.detail.push_str(&places(&domains));
                    answer
                }
                Err(why) => Answer::refused(Reply::Failure, format!("no list: {why}")),
            };
        }
        let listing = self.hypervisors.list().await;
        if let Some((uri, error)) = listing.failed.first() {
            return Answer::refused(Reply::Failure, format!("no list, as {uri} was never seen: {error}"));
        }
        let domains = listing.domains.iter().map(|domain| (domain.name.as_str(), domain.uuid, domain.state));
        let mut answer = self.listed(peer, domains);
        for (uri, error) in &listing.remembered {
            answer.detail.push_str(&format!("; those of {uri} as they were last known: {error}"));
        }
        answer
    }

    /// A list of what the peer may see of these domains: name, UUID, libvirt's state.
    fn listed<'d>(&self, peer: &Authenticated, domains: impl Iterator<Item = (&'d str, Uuid, u8)>) -> Answer {
        let (mut bytes, who, groups) = (vec![HOST_LIST], peer.request().who(), self.groups.now());
        let mut count = 0;
        for (name, uuid, state) in domains.filter(|(name, uuid, _)| groups.may_see(peer.owner(), &who, name, *uuid)) {
            bytes.extend_from_slice(HostRecord::new(name, &uuid.to_string(), state).as_bytes());
            count += 1;
        }
        bytes.extend_from_slice(HostRecord::END.as_bytes());
        bytes.push(Reply::Success.to_wire());
        Answer { bytes, result: Ending::Success, detail: counted(count, "domain"), dead: None, tone: Tone::Asked }
    }
}

/// Where the domains of all hosts are, for the log.
fn places(domains: &[SharedDomain]) -> String {
    let place = |SharedDomain { domain, hosts }: &SharedDomain| {
        format!("{} on {}", domain.name.escape_debug(), hosts.join(" and ").escape_debug())
    };
    let mut places: Vec<String> = domains.iter().take(PLACES_MAX).map(place).collect();
    match domains.len().checked_sub(PLACES_MAX) {
        Some(left @ 1..) => places.push(format!("and {left} more of all hosts")),
        Some(0) | None if places.is_empty() => return String::new(),
        Some(0) | None => {}
    }
    format!(": {}", places.join(", "))
}

#[cfg(test)]
mod tests {
    use fence_common::hosts::HostDomain;

    use super::*;

    #[test]
    fn a_list_says_where_each_domain_is_and_is_no_longer_than_a_line() {
        let domain = |name: &str, hosts: &[&str]| SharedDomain {
            domain: HostDomain { uuid: Uuid::nil(), name: name.to_owned(), state: 1 },
            hosts: hosts.iter().map(ToString::to_string).collect(),
        };
        assert_eq!(places(&[]), "");
        let two = [domain("vm-a", &["host1"]), domain("v\nm", &["host2", "host1"])];
        assert_eq!(places(&two), ": vm-a on host1, v\\nm on host2 and host1");
        let many = vec![domain("x", &["y"]); PLACES_MAX + 3];
        assert!(places(&many).ends_with("x on y, and 3 more of all hosts"));
    }
}
