//! A machine that runs here, and of which only a URI without a driver of this host speaks.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use super::*;
use crate::hypervisor::fence::Unproven;
use crate::hypervisor::known::{Entry, Instance};
use crate::hypervisor::process::{Driver, Victim};

/// A real process with a machine's arguments. It ends with the test.
pub(super) struct Machine {
    child: Child,
    pub(super) uuid: Uuid,
}

impl Machine {
    pub(super) fn start(name: &str) -> Self {
        // Nobody else's, also not of another run of these tests on this host.
        let uuid = Uuid::from_u64_pair(Moment::now().nanos(), u64::from(std::process::id()));
        let mut command = Command::new("sh");
        command.args(["-c", "while :; do sleep 3600; done", "sh", "-name", &format!("guest={name}"), "-uuid"]);
        let child = command.arg(uuid.to_string()).stdin(Stdio::null()).process_group(0).spawn().unwrap();
        Self { child, uuid }
    }

    fn lives(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let group = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        if let Some(group) = group {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

/// A URI that calls the machine off, before this host's own, which knows nothing of it or is not
/// there.
async fn called_off(machine: &Machine, name: &str) -> (Hypervisors, Scratch) {
    let file = Node::default().shut_off(name, machine.uuid.as_u128()).file();
    let uris = [file.uri(), "qemu:///system".to_owned()];
    let h = Hypervisors::with_limits(&uris, QUICK, Options::default());
    h.first_round().await;
    (h, file)
}

/// Whether the URI that calls it off has started it.
async fn is_started(h: &Hypervisors, uuid: Uuid) -> bool {
    let (sender, receiver) = std::sync::mpsc::channel();
    arrange(h, move |connect| {
        sender.send(Domain::lookup_by_uuid(connect, uuid).unwrap().is_active().unwrap()).unwrap();
    })
    .await;
    receiver.recv().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_uri_without_driver_cannot_call_a_living_domain_off() {
    let _none = ORPHANS.lock().await;
    let mut machine = Machine::start("lost-status");
    let (h, _file) = called_off(&machine, "lost-status").await;
    for target in [name("lost-status"), Target::Uuid(machine.uuid)] {
        let status = order(&h, Op::Status, target).await;
        assert_eq!((status.reply, status.detail), (Reply::Success, Detail::Active(State(1))));
    }
    assert_eq!(h.presence(&name("lost-status")).await, Presence::Runs);
    assert!(machine.lives());
    drop(machine);
    assert_eq!(order(&h, Op::Status, name("lost-status")).await.detail, Detail::ShutOff);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_that_lives_here_is_not_started_at_another_uri() {
    let _none = ORPHANS.lock().await;
    let mut machine = Machine::start("lost-on");
    let (h, _file) = called_off(&machine, "lost-on").await;
    let on = order(&h, Op::On, name("lost-on")).await;
    assert_eq!(on.reply, Reply::Failure, "{}", on.detail);
    assert!(!is_started(&h, machine.uuid).await, "a second copy was started");
    assert!(machine.lives());
    let uuid = machine.uuid;
    drop(machine);
    assert_eq!(order(&h, Op::On, name("lost-on")).await.detail, Detail::Started(State(1)));
    assert!(is_started(&h, uuid).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_off_is_no_success_while_it_lives_here() {
    let _none = ORPHANS.lock().await;
    let mut machine = Machine::start("lost-off");
    let (h, _file) = called_off(&machine, "lost-off").await;
    for op in [Op::Off, Op::Reboot] {
        for target in [name("lost-off"), Target::Uuid(machine.uuid)] {
            let off = order(&h, op, target).await;
            assert!(off.reply == Reply::Failure || !machine.lives(), "FALSE SUCCESS: {}", off.detail);
        }
    }
    // A namesake is another domain.
    let other = Node::default().shut_off("lost-off", 1).file();
    let h = Hypervisors::with_limits(&[other.uri(), "qemu:///system".to_owned()], QUICK, Options::default());
    h.first_round().await;
    assert_eq!(order(&h, Op::Off, name("lost-off")).await.detail, Detail::AlreadyOff);
    drop(machine);
}

/// Enters a domain in the table of a URI. Its process is this machine; without one it is off.
pub(super) fn enter(h: &Hypervisors, uri: usize, domain: (&str, u128), driver: Driver, process: Option<&Machine>) {
    let table = &h.known.uris[uri].table;
    let victim = process.map(|machine| Arc::new(Victim::dangerous_for_test(driver, domain.0, &machine.child)));
    let instance = victim.map(|victim| Instance { id: 77, state: State(1), victim: Some(victim) });
    let generation = table.generation();
    let (name, macs) = (domain.0.to_owned(), Arc::default());
    let entry = Entry { name, persistent: true, moved_away: false, instance, macs, cid: None, generation };
    table.put(Uuid::from_u128(domain.1), Some(entry));
}

/// Waits until a URI's table holds what its libvirt has: nothing is entered over it later.
async fn filled(h: &Hypervisors, uri: usize) {
    for _ in 0..1000 {
        if h.known.uris[uri].table.is_filled() {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("it is never filled");
}

/// libvirt has lost its process on the way to another host. The domain may run there.
#[tokio::test(flavor = "multi_thread")]
async fn an_orphan_that_was_on_its_way_is_left_alone_and_is_not_off() {
    let (h, _file) = node(Node::default().running("leaving", 1).running("lost", 2)).await;
    filled(&h, 0).await;
    let (mut leaving, mut lost) = (Machine::start("leaving"), Machine::start("lost"));
    for (name, number, process) in [("leaving", 1, &leaving), ("lost", 2, &lost)] {
        enter(&h, 0, (name, number), Driver::Qemu, Some(process));
        enter(&h, 0, (name, number), Driver::Qemu, None);
        assert_eq!(h.known.uris[0].table.orphans(Uuid::from_u128(number)).len(), 1);
    }
    h.known.uris[0].table.note_leaving(Uuid::from_u128(1), true);
    for op in [Op::Off, Op::Reboot] {
        let off = order(&h, op, name("leaving")).await;
        let migrating = Detail::NotProvenOff { was: State(0), why: Unproven::Migrating };
        assert_eq!((off.reply, off.detail), (Reply::Failure, migrating));
        assert!(leaving.lives(), "it may be what the machine runs from there");
    }
    assert_eq!(order(&h, Op::Off, name("lost")).await.reply, Reply::Success);
    assert!(!lost.lives());
}

/// A container is killed by its own process. Another URI calls a machine of that name off, and that
/// machine lives here.
#[tokio::test(flavor = "multi_thread")]
async fn a_direct_kill_of_a_namesake_is_no_success_while_it_lives_here() {
    let _none = ORPHANS.lock().await;
    let (mut machine, mut contained) = (Machine::start("same"), Machine::start("other"));
    let here = Node::default().running("same", 1).file();
    let there = Node::default().shut_off("same", machine.uuid.as_u128()).file();
    let uris = [here.uri(), there.uri(), "qemu:///system".to_owned()];
    let h = Hypervisors::with_limits(&uris, QUICK, Options::default());
    h.first_round().await;
    filled(&h, 0).await;
    filled(&h, 1).await;
    enter(&h, 0, ("same", 1), Driver::Lxc, Some(&contained));
    let off = order(&h, Op::Off, name("same")).await;
    assert!(!contained.lives(), "{}", off.detail);
    assert!(off.reply == Reply::Failure || !machine.lives(), "FALSE SUCCESS: {}", off.detail);
}

/// The one URI has told of its domains, the other one has not yet.
#[tokio::test(flavor = "multi_thread")]
async fn every_uri_is_asked_before_a_kill() {
    let (one, two) = (Node::default().running("twin", 1).file(), Node::default().running("twin", 2).file());
    let h = connect(&[one.uri(), two.uri()]).await;
    let unseen = async |target: &Target| h.known.is_known_unseen(target).await;
    filled(&h, 0).await;
    filled(&h, 1).await;
    assert!(!unseen(&name("twin")).await, "nothing is unseen");
    for uri in &h.known.uris {
        uri.table.forget_for_test();
    }
    assert!(unseen(&name("twin")).await);
    assert!(unseen(&uuid(2)).await);
    assert!(!unseen(&name("nobody")).await);
    enter(&h, 0, ("twin", 1), Driver::Lxc, None);
    assert!(!unseen(&uuid(1)).await, "what is in the table is no news");
    assert!(unseen(&name("twin")).await);
}
