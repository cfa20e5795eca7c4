//! A URI that does not answer: what it said last still counts. And `status` never says "off" where
//! `off` would not.

use super::*;
use crate::hypervisor::known::{Entry, FoundDomain, Instance};
use crate::hypervisor::libvirt::{Power, Seen};

/// Nobody is there: it never connects.
const SILENT: &str = "qemu+unix:///system?socket=/nonexistent/socket";

/// What the silent URI said last.
#[derive(Clone, Copy, Debug)]
enum Said {
    Nothing,
    Off,
    Active,
    MovedAway,
    /// Shut off, and stopped for another host to go on with it.
    Left,
}

impl Said {
    /// Enters it as if it had been observed.
    fn enter(self, h: &Hypervisors, uri: usize, number: u128) {
        let (table, uuid) = (&h.known.uris[uri].table, Uuid::from_u128(number));
        let instance = match self {
            Self::Nothing => return,
            Self::Active => Some(Instance { id: 7, state: State(1), victim: None }),
            Self::Off | Self::MovedAway | Self::Left => None,
        };
        let moved_away = matches!(self, Self::MovedAway);
        let (name, macs) = ("a".to_owned(), [].into());
        table.put(uuid, Some(Entry { name, persistent: true, moved_away, instance, macs, cid: None, generation: 0 }));
        if matches!(self, Self::Left) {
            table.note_leaving(uuid, true);
        }
    }
}

/// The rule's table: what one URI said before it fell silent, whether the domain runs at the one
/// that answers, and what `status`, `off` and `on` reply then.
#[tokio::test(flavor = "multi_thread")]
async fn the_last_word_of_a_silent_uri_counts() {
    use Reply::{Failure, Off, Success};
    for (said, runs_here, status, off, on) in [
        (Said::Nothing, false, Off, Success, Success),
        (Said::Nothing, true, Success, Success, Success),
        (Said::Off, false, Off, Success, Success),
        (Said::Off, true, Success, Success, Success),
        (Said::Active, false, Failure, Failure, Failure),
        (Said::Active, true, Success, Failure, Success),
        (Said::MovedAway, false, Failure, Failure, Success),
        (Said::MovedAway, true, Success, Success, Success),
        (Said::Left, false, Failure, Failure, Success),
        (Said::Left, true, Success, Success, Success),
    ] {
        // What is asked, what must be replied, and whether the domain runs here afterwards.
        for (op, wanted, runs) in [(Op::Status, status, runs_here), (Op::Off, off, false), (Op::On, on, on == Success)]
        {
            let node = Node::default();
            let here = if runs_here { node.running("a", 1) } else { node.shut_off("a", 1) }.file();
            let h = Hypervisors::with_limits(&[here.uri(), SILENT.to_owned()], QUICK, Options::default());
            while !h.any_connected() {
                sleep(Duration::from_millis(5)).await;
            }
            said.enter(&h, 1, 1);
            let outcome = order(&h, op, name("a")).await;
            let case = format!("{said:?} there, runs here: {runs_here}, {op:?}");
            assert_eq!(outcome.reply, wanted, "{case}: {}", outcome.detail);
            // A doubt about one copy spares no other one, and starts none.
            let listed = h.list().await.domains[0].state;
            assert_eq!(listed == 1, runs, "{case}: {}", outcome.detail);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_at_a_silent_uri_is_never_off() {
    let here = Node::default().shut_off("a", 1).file();
    let h = Hypervisors::with_limits(&[here.uri(), SILENT.to_owned()], QUICK, Options::default());
    while !h.any_connected() {
        sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(h.presence(&name("a")).await, Presence::Defined);
    Said::Active.enter(&h, 1, 1);
    assert_eq!(h.presence(&name("a")).await, Presence::Unknown);
    Said::Left.enter(&h, 1, 1);
    assert_eq!(h.presence(&name("a")).await, Presence::Unknown);
}

/// `off`, `on` and `status` agree: what has left is not off here.
#[tokio::test(flavor = "multi_thread")]
async fn status_is_a_failure_where_off_and_on_refuse() {
    let (h, _file) = node(Node::default().shut_off("a", 1)).await;
    until(&h, "a", Reply::Off).await;
    h.known.uris[0].table.note_leaving(Uuid::from_u128(1), true);
    for op in [Op::Status, Op::Off, Op::On] {
        let outcome = order(&h, op, name("a")).await;
        assert_eq!((outcome.reply, outcome.detail), (Reply::Failure, Detail::MovedAway), "{op:?}");
    }
    assert_eq!(h.presence(&name("a")).await, Presence::Unknown);
    assert_eq!(h.list().await.domains[0].state, 1, "a list says off of it");
}

/// This host knows better than a silent libvirtd of its own: no such container is here. A machine
/// may have moved.
#[tokio::test(flavor = "multi_thread")]
async fn a_word_that_this_host_disproves_is_no_veto() {
    for (local, wanted) in [("lxc:///", Reply::Success), (SILENT, Reply::Failure)] {
        let here = Node::default().shut_off("no-such-domain", 1).file();
        let h = Hypervisors::with_limits(&[here.uri(), local.to_owned()], QUICK, Options::default());
        while !h.any_connected() {
            sleep(Duration::from_millis(5)).await;
        }
        let (name, macs) = ("no-such-domain".to_owned(), [].into());
        let instance = Some(Instance { id: 7, state: State(1), victim: None });
        let entry =
            Entry { name: name.clone(), persistent: true, moved_away: false, instance, macs, cid: None, generation: 0 };
        h.known.uris[1].table.put(Uuid::from_u128(1), Some(entry));
        let off = order(&h, Op::Off, Target::Name(name.clone())).await;
        assert_eq!(off.reply, wanted, "{local}: {}", off.detail);
        let status = order(&h, Op::Status, Target::Name(name)).await;
        assert_eq!(status.reply == Reply::Off, wanted == Reply::Success, "{local}: {}", status.detail);
    }
}

/// Of a machine that is not here, and of which libvirt has no record, nobody knows whether it has
/// moved.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_without_a_record_may_have_moved() {
    let local = ["lxc:///", "qemu:///system"].map(str::to_owned);
    let h = Hypervisors::with_limits(&local, QUICK, Options::default());
    for (index, disproved) in [(0, true), (1, false)] {
        let seen = Seen {
            name: "no-such-domain".to_owned(),
            uuid: Uuid::from_u128(1),
            id: Some(7),
            power: Power::Active(State(1)),
        };
        assert_eq!(h.known.is_disproved(&FoundDomain { index, seen }).await, disproved, "{}", local[index]);
    }
}
