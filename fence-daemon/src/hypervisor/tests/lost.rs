//! A machine that runs here, and of which only a URI without a driver of this host speaks.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use super::*;

/// A real process with a machine's arguments. It ends with the test.
struct Machine {
    child: Child,
    uuid: Uuid,
}

impl Machine {
    fn start(name: &str) -> Self {
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
async fn what_lives_here_is_not_off_by_the_word_of_a_uri_without_a_driver() {
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
async fn no_second_copy_is_started_at_another_uri_of_what_lives_here() {
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
