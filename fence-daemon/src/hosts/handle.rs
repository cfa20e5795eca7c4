//! The door to the hosts that answer together: the pipeline asks through it, and reports look
//! through it.

use fence_common::caller::Vouched;
use fence_common::domain_state::SHUT_OFF;
use fence_common::hosts::{GroupAnswer, HostDomain, HostList, NoAnswer};
use fence_common::ledger::RequestId;
use fence_common::target::Target;
use fence_common::wire::{Op, Reply};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use super::local::{self, Verdict};
use super::view::{Shown, View};
use crate::clock::Moment;
use crate::hypervisor::{Deadline, Hypervisors, Requester};
use crate::policy::Authorized;

/// Whether this host is the one that calls a client back.
#[derive(Debug)]
pub enum Election {
    /// It is.
    Won(Elected),
    /// Another one is.
    Lost,
    /// The hosts cannot agree.
    Open,
}

/// This host calls the client of a request back, and the others wait for its word.
#[derive(Debug)]
pub struct Elected {
    id: RequestId,
    is_reached: bool,
    wishes: mpsc::UnboundedSender<Wish>,
}

impl Elected {
    /// The client was reached, so no other host is to call it back.
    pub fn reached(&mut self) {
        self.is_reached = true;
    }
}

impl Drop for Elected {
    fn drop(&mut self) {
        // Without a driver nobody waits for it.
        let _ = self.wishes.send(Wish::Called(self.id, self.is_reached));
    }
}

/// Who wants an answer of all hosts, where that matters.
#[derive(Debug, Default)]
pub(super) struct HostsClient {
    pub(super) requester: Option<Requester>,
    /// The domain of this host that it runs in.
    pub(super) client: Option<Vouched>,
    /// Its Ethernet addresses.
    pub(super) macs: Vec<[u8; 6]>,
}

/// A question to all hosts.
#[derive(Debug)]
pub(super) struct HostsQuestion {
    pub(super) request: RequestId,
    pub(super) op: Op,
    pub(super) target: Option<Target>,
    pub(super) client: HostsClient,
    /// Of the answer.
    pub(super) by: Instant,
    pub(super) answer: oneshot::Sender<HostsAnswer>,
}

/// What came of a question.
#[derive(Debug)]
pub(super) struct HostsAnswer {
    pub(super) answer: GroupAnswer,
    /// What came of the order here, if this host carried it out.
    pub(super) here: Option<Verdict>,
}

/// What the pipeline wants of the driver.
#[derive(Debug)]
pub(super) enum Wish {
    /// To know whether this host calls back.
    Heard(RequestId, oneshot::Sender<bool>),
    /// That the others know whether the client was reached.
    Called(RequestId, bool),
    /// An answer of all hosts.
    Ask(HostsQuestion),
}

/// A domain, and the hosts that have it. Those where it runs come first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedDomain {
    /// The domain. It runs if it runs on any host.
    pub domain: HostDomain,
    /// The names of the hosts.
    pub hosts: Vec<String>,
}

/// The hosts that answer together. Clones are the same ones.
#[derive(Clone, Debug)]
pub struct Hosts {
    wishes: mpsc::UnboundedSender<Wish>,
    shown: Shown,
}

impl Hosts {
    pub(super) fn new(shown: Shown) -> (Self, mpsc::UnboundedReceiver<Wish>) {
        let (wishes, coming) = mpsc::unbounded_channel();
        (Self { wishes, shown }, coming)
    }

    /// The cluster as this host sees it.
    #[must_use]
    pub fn view(&self) -> View {
        self.shown.now()
    }

    /// Decides who calls the client of this request back. By `by` it is not this host.
    pub async fn elect(&self, id: RequestId, by: Instant) -> Election {
        let (answer, answered) = oneshot::channel();
        if self.shown.alone().is_some() || self.wishes.send(Wish::Heard(id, answer)).is_err() {
            return Election::Open;
        }
        match timeout_at(by, answered).await {
            Ok(Ok(true)) => Election::Won(Elected { id, is_reached: false, wishes: self.wishes.clone() }),
            Ok(Ok(false)) => Election::Open,
            Ok(Err(_)) | Err(_) => Election::Lost,
        }
    }

    /// Has all hosts carry an order out. Where they cannot be asked only what runs here is fenced.
    pub async fn carry_out(
        &self,
        hypervisors: &Hypervisors,
        order: &Authorized,
        id: RequestId,
        requester: Option<Requester>,
        deadline: &Deadline,
    ) -> Verdict {
        if let Some(why) = self.shown.alone() {
            return local::alone(hypervisors, order, requester, deadline, &why).await;
        }
        let (op, target) = (order.op(), Some(order.target().clone()));
        let is_fence = matches!(op, Op::Off | Op::Reboot);
        let (client, macs) = requester.filter(|_| is_fence).map(|one| hypervisors.client(one)).unwrap_or_default();
        let client = HostsClient { requester, client, macs };
        let HostsAnswer { answer, here } = match self.ask(id, op, target, client, deadline.by()).await {
            Ok(told) => told,
            Err(why) => return Verdict::failure(why),
        };
        let reply = match answer {
            GroupAnswer::Success => Reply::Success,
            GroupAnswer::Off => Reply::Off,
            GroupAnswer::Failure(why) => {
                let is_known = why != NoAnswer::Unknown;
                return Verdict { is_known, ..Verdict::failure(why.to_string()) };
            }
            GroupAnswer::List(_) => return Verdict::failure("a list is no answer to this: a bug of fence-xdp"),
        };
        match here.filter(|here| here.reply == reply) {
            Some(here) => here,
            None => Verdict {
                reply,
                proven_off: is_fence.then(Moment::now),
                detail: said_by_all(op, reply).to_owned(),
                is_known: true,
            },
        }
    }

    /// The domains of all hosts, each once.
    ///
    /// # Errors
    /// Why the list would be shorter than the truth.
    pub async fn list(&self, id: RequestId, by: Instant) -> Result<Vec<SharedDomain>, String> {
        match self.ask(id, Op::HostList, None, HostsClient::default(), by).await?.answer {
            GroupAnswer::List(lists) => Ok(merged(lists)),
            GroupAnswer::Failure(why) => Err(why.to_string()),
            GroupAnswer::Success | GroupAnswer::Off => Err("there is no list: a bug of fence-xdp".to_owned()),
        }
    }

    /// Whether corosync, quorum and every configured host are well.
    ///
    /// # Errors
    /// Which is not.
    pub async fn monitor(&self, id: RequestId, by: Instant) -> Result<(), String> {
        match self.ask(id, Op::DevStatus, None, HostsClient::default(), by).await?.answer {
            GroupAnswer::Success => Ok(()),
            GroupAnswer::Failure(why) => Err(why.to_string()),
            GroupAnswer::Off | GroupAnswer::List(_) => Err("not an answer to this: a bug of fence-xdp".to_owned()),
        }
    }

    async fn ask(
        &self,
        id: RequestId,
        op: Op,
        target: Option<Target>,
        client: HostsClient,
        by: Instant,
    ) -> Result<HostsAnswer, String> {
        if let Some(why) = self.shown.alone() {
            return Err(format!("the other hosts cannot be asked: {why}"));
        }
        let gone = || "this host's part in the cluster has ended: a bug of fence-xdp".to_owned();
        let (answer, answered) = oneshot::channel();
        self.wishes
            .send(Wish::Ask(HostsQuestion { request: id, op, target, client, by, answer }))
            .map_err(|_| gone())?;
        match timeout_at(by, answered).await {
            Ok(told) => told.map_err(|_| gone()),
            Err(_) => Err("the other hosts did not answer in time".to_owned()),
        }
    }
}

/// What the log says of an answer that another host has brought about.
fn said_by_all(op: Op, reply: Reply) -> &'static str {
    match (op, reply) {
        (Op::Off, _) => "off, by the word of all hosts",
        (Op::Reboot, _) => "off, and started again by its host",
        (Op::On, _) => "on, by the word of its host",
        (_, Reply::Off) => "shut off, by the word of all hosts",
        (_, _) => "running, by the word of its host",
    }
}

/// Each domain once.
fn merged(lists: impl IntoIterator<Item = HostList>) -> Vec<SharedDomain> {
    let of_host = |HostList { name, domains, .. }| {
        domains.into_iter().map(move |domain| SharedDomain { domain, hosts: vec![String::clone(&name)] })
    };
    let mut all: Vec<SharedDomain> = lists.into_iter().flat_map(of_host).collect();
    // Stable: hosts stay in the order of their node IDs.
    all.sort_by(|SharedDomain { domain: one, .. }, SharedDomain { domain: other, .. }| {
        let is_off = |domain: &HostDomain| domain.state == SHUT_OFF;
        (&one.name, one.uuid, is_off(one)).cmp(&(&other.name, other.uuid, is_off(other)))
    });
    all.dedup_by(|later, first| {
        let is_same = (&later.domain.name, later.domain.uuid) == (&first.domain.name, first.domain.uuid);
        if is_same {
            first.hosts.append(&mut later.hosts);
        }
        is_same
    });
    all
}

#[cfg(test)]
mod tests {
    use fence_common::domain_state::RUNNING;
    use fence_common::hosts::NodeId;
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_domain_of_two_hosts_is_listed_once_and_runs_if_it_runs_anywhere() {
        let domain = |name: &str, uuid, state| HostDomain { name: name.into(), uuid: Uuid::from_u128(uuid), state };
        let list = |node, domains| HostList { node: NodeId(node), name: format!("host{node}"), domains };
        let lists = [
            list(1, vec![domain("b", 2, SHUT_OFF), domain("a", 1, SHUT_OFF)]),
            list(2, vec![domain("a", 1, RUNNING), domain("b", 2, SHUT_OFF), domain("a", 3, SHUT_OFF)]),
        ];
        let shared =
            |domain, hosts: &[&str]| SharedDomain { domain, hosts: hosts.iter().map(ToString::to_string).collect() };
        let expected = vec![
            shared(domain("a", 1, RUNNING), &["host2", "host1"]),
            shared(domain("a", 3, SHUT_OFF), &["host2"]),
            shared(domain("b", 2, SHUT_OFF), &["host1", "host2"]),
        ];
        assert_eq!(merged(lists), expected);
    }
}
