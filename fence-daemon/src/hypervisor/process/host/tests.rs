//! Real processes with a machine's arguments, and a `/proc` of FIFOs in which reading one never
//! ends.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use tempfile::tempdir;

use super::*;

/// A process with these arguments that does nothing, and is gone with the test.
struct Idle(Child);

impl Idle {
    fn start(script: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new("sh");
        // A group of its own: what the script starts ends with it.
        command.args(["-c", script, "sh"]).args(arguments).stdin(Stdio::null()).process_group(0);
        Self(command.spawn().unwrap())
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        if let Some(group) = rustix::process::Pid::from_raw(self.pid()) {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        let _ = self.0.wait();
    }
}

const WAIT: &str = "while :; do sleep 3600; done";
/// A launcher: another process with the same arguments below it.
const LAUNCH: &str = "sh -c 'while :; do sleep 3600; done' sh \"$@\"; exit";

fn host() -> Host {
    Host::new([Driver::Qemu, Driver::Lxc].into_iter(), Vec::new())
}

fn whom(name: &str) -> Whom {
    // Nobody else's, also not of another run of these tests on this host.
    let uuid = Uuid::from_u64_pair(Moment::now().nanos(), u64::from(std::process::id()));
    Whom { driver: Driver::Qemu, uuid, name: name.to_owned(), ids: Vec::new(), proven_dead: false }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// Waits until so many processes of it live.
async fn living(host: &Host, whom: &Whom, count: usize) -> Vec<Arc<Process>> {
    for _ in 0..1000 {
        if let Remains::Living(found) = host.remains(whom).await
            && found.len() == count
        {
            return found;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("{:?}", host.remains(whom).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_process_with_the_machines_uuid_is_found_and_killed() {
    let (host, whom, other) = (host(), whom("vm"), whom("other"));
    assert!(matches!(host.remains(&whom).await, Remains::Nothing));
    let uuid = whom.uuid.to_string();
    let launcher = Idle::start(LAUNCH, &["-name", "guest=vm,debug-threads=on", "-uuid", &uuid]);
    let found = living(&host, &whom, 2).await;
    assert!(found.iter().any(|process| process.pid() == launcher.pid()));
    assert!(matches!(host.remains(&other).await, Remains::Nothing));

    let cleared = host.clear(&whom, None, None, &Deadline::at(soon()), soon()).await.unwrap();
    assert_eq!(cleared.killed.len(), 2, "{cleared:?}");
    assert!(found.iter().all(|process| process.is_dead()));
    assert!(matches!(host.remains(&whom).await, Remains::Nothing));
    assert_eq!(host.clear(&whom, None, None, &Deadline::at(soon()), soon()).await.unwrap().killed, Vec::<i32>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scan_is_no_word_about_a_domain_that_it_was_not_for() {
    let (host, whom, other) = (host(), whom("vm"), whom("other"));
    let look = host.look(vec![whom.clone()]).await;
    assert!(look.found_none_of(&whom) && !look.found_none_of(&other));
    let instance = Whom { ids: vec![7], ..whom.clone() };
    assert!(!look.found_none_of(&instance), "a process may be this instance's");
    let _machine = Idle::start(WAIT, &["-name", "guest=vm", "-uuid", &whom.uuid.to_string()]);
    living(&host, &whom, 1).await;
    let later = host.look(vec![whom.clone()]).await;
    assert!(!later.found_none_of(&whom));
    // What a scan does not clear, another one decides.
    for look in [None, Some(&*later), Some(&*host.look(vec![other]).await)] {
        assert!(matches!(host.remains_by(look, &whom).await, Remains::Living(_)));
    }
    let cleared = host.clear(&whom, None, Some(&later), &Deadline::at(soon()), soon()).await.unwrap();
    assert_eq!(cleared.killed.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_only_mentions_the_uuid_is_a_doubt() {
    let (host, whom) = (host(), whom("vm"));
    let mut other = Idle::start(WAIT, &["-uuid", &whom.uuid.to_string()]);
    for _ in 0..1000 {
        if matches!(host.remains_now(&whom).await, Remains::Doubt(_)) {
            break;
        }
        sleep(Duration::from_millis(10)).await;
    }
    let left = host.clear(&whom, None, None, &Deadline::at(soon()), soon()).await;
    assert!(matches!(&left, Err(Left::Doubt(why)) if why.contains(&other.pid().to_string())), "{left:?}");
    assert!(other.0.try_wait().unwrap().is_none(), "it was killed");
    drop(other);
    assert!(matches!(host.remains(&whom).await, Remains::Nothing));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_cannot_be_read_keeps_only_what_it_may_be_from_being_off() {
    let scratch = tempdir().unwrap();
    let process = |pid: i32, group: &str| {
        let directory = scratch.path().join(pid.to_string());
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(directory.join("cgroup"), format!("0::{group}\n")).unwrap();
        std::fs::write(directory.join("stat"), format!("{pid} (x) S 1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 42 0\n"))
            .unwrap();
        directory.join("cmdline")
    };
    // To open a FIFO for reading waits until somebody writes.
    for (pid, group) in [(100_001, "/system.slice/other.service"), (100_002, "/machine/qemu-3-stuck.libvirt-qemu")] {
        let cmdline = process(pid, group);
        nix::unistd::mkfifo(&cmdline, nix::sys::stat::Mode::S_IRUSR).unwrap();
    }
    std::fs::write(process(100_003, "/"), b"sleep\0").unwrap();
    let host = Host::below(scratch.path(), [Driver::Qemu].into_iter(), Vec::new());
    let begun = Instant::now();
    for _ in 0..3 {
        assert!(matches!(host.remains(&whom("other")).await, Remains::Nothing));
        let stuck = host.remains(&whom("stuck")).await;
        assert!(matches!(&stuck, Remains::Doubt(why) if why.contains("100002")), "{stuck:?}");
    }
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    // Each costs one thread, however often it is looked at.
    let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let names = threads.map(|thread| std::fs::read_to_string(thread.path().join("comm")).unwrap_or_default());
    assert!(names.filter(|name| name.trim() == "host-scan").count() <= 8);
    // They can be read again.
    for pid in [100_001, 100_002] {
        let (cmdline, fifo) =
            (scratch.path().join(format!("{pid}/cmdline")), scratch.path().join(format!("{pid}/fifo")));
        std::fs::rename(&cmdline, &fifo).unwrap();
        std::fs::write(&cmdline, b"sleep\0").unwrap();
        std::fs::OpenOptions::new().write(true).open(&fifo).unwrap();
    }
    for _ in 0..30 {
        if matches!(host.remains(&whom("stuck")).await, Remains::Nothing) {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("{:?}", host.remains(&whom("stuck")).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_looks_at_once_are_a_few_scans() {
    let host = host();
    let looks: Vec<_> = (0..100)
        .map(|_| {
            let host = host.clone();
            tokio::spawn(async move { Arc::as_ptr(&host.look(Vec::new()).await) as usize })
        })
        .collect();
    let mut scans = std::collections::HashSet::new();
    for look in looks {
        scans.insert(look.await.unwrap());
    }
    assert!(scans.len() <= 50, "{}", scans.len());
}

/// The kernel takes away the memory of a killed process first, and its command line with it. What
/// follows can take seconds: the release of that memory, the last I/O.
#[test]
fn a_killed_process_that_cannot_be_read_is_no_doubt() {
    let scope = scope::Scope::of("0::/machine/qemu-3-vm.libvirt-qemu\n");
    let kind = Kind::Unreadable { scope, was: None, why: "it says nothing of itself" };
    let found = vec![FoundProcess { pid: 100_001, kind, held: None }];
    let look = Look { found, ..Look::default() };
    let vm = whom("vm");
    assert!(matches!(look.remains(&vm), Remains::Doubt(_)));
    assert!(matches!(look.remains_beside(&vm, |pid| pid == 100_002), Remains::Doubt(_)), "another one");
    assert!(matches!(look.remains_beside(&vm, |pid| pid == 100_001), Remains::Nothing));
}
