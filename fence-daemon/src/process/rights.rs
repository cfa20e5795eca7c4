//! The capabilities that the daemon keeps: what a fence needs, and no more.
//!
//! Loading the kernel program is the most powerful thing that the daemon does, and the start alone
//! does it. Links are made and remade from the program's descriptor, without a capability.
//!
//! Capabilities belong to threads, and a thread inherits those of the thread that starts it. So the
//! first thread gives up the others before the runtime starts. The [`Loader`] is started earlier:
//! its thread keeps what loading takes, and ends when it has loaded.

use std::io;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;

use fence_config::Config;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

/// What a fence needs: to read guests' processes and files, to kill, and to ask where the devices
/// of containers lead. The kernel tells of other network namespaces with CAP_NET_ADMIN only.
const TO_FENCE: CapabilitySet = CapabilitySet::KILL
    .union(CapabilitySet::SYS_PTRACE)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::NET_ADMIN);

/// What loading the kernel program takes. A container may give CAP_SYS_ADMIN alone.
const TO_LOAD: CapabilitySet =
    CapabilitySet::BPF.union(CapabilitySet::PERFMON).union(CapabilitySet::NET_ADMIN).union(CapabilitySet::SYS_ADMIN);

/// The first Linux that lets a process without CAP_BPF use the maps and programs that it has.
const USES_WITHOUT: (u32, u32) = (5, 19);

/// A thread that may load the kernel program.
#[derive(Debug)]
pub struct Loader(SyncSender<Box<dyn FnOnce() + Send>>);

impl Loader {
    /// Starts the thread. It inherits the capabilities of this one.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn start() -> io::Result<Self> {
        let (jobs, waiting) = sync_channel::<Box<dyn FnOnce() + Send>>(1);
        thread::Builder::new().name("fence-load".to_owned()).spawn(move || {
            // If it cannot be limited, it may all the same do no more than load.
            let _ = keep_in_this_thread(TO_LOAD);
            if let Ok(job) = waiting.recv() {
                job();
            }
        })?;
        Ok(Self(jobs))
    }

    /// Runs `job` in the thread, which then ends. Waits for it.
    pub fn run(self, job: impl FnOnce() + Send + 'static) {
        let (done, waiting) = sync_channel::<()>(1);
        let job = move || {
            job();
            drop(done);
        };
        // The thread waits for this one job, and the channel ends with it.
        if self.0.send(Box::new(job)).is_ok() {
            let _ = waiting.recv();
        }
    }
}

/// Gives up what serving this configuration does not need, for this thread and those that it
/// starts.
///
/// # Errors
/// The kernel refuses it: a text for the log.
pub fn give_up(config: &Config) -> Result<(), String> {
    let release = nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned());
    let kept = needed(config, &release.unwrap_or_default(), locks_without_right());
    keep_in_this_thread(kept)
        .map_err(|error| format!("cannot give up capabilities: {error}; going on with all of them"))
}

fn keep_in_this_thread(kept: CapabilitySet) -> io::Result<()> {
    let CapabilitySets { effective, permitted, inheritable } = capabilities(None)?;
    let all =
        CapabilitySets { effective: effective & kept, permitted: permitted & kept, inheritable: inheritable & kept };
    Ok(set_capabilities(None, all)?)
}

/// Whether any amount of memory may be locked without CAP_IPC_LOCK.
fn locks_without_right() -> bool {
    getrlimit(Resource::RLIMIT_MEMLOCK).is_ok_and(|(soft, _)| soft == RLIM_INFINITY)
}

/// What serving needs.
fn needed(config: &Config, release: &str, locks_without_right: bool) -> CapabilitySet {
    let mut needed = TO_FENCE;
    // A port is opened again when an address comes back.
    if config.has_privileged_port() {
        needed |= CapabilitySet::NET_BIND_SERVICE;
    }
    if config.starts_programs() {
        needed |= CapabilitySet::SETPCAP;
    }
    // A lock of future memory counts against the limit with every allocation.
    if config.stress.lock_memory && !locks_without_right {
        needed |= CapabilitySet::IPC_LOCK;
    }
    if !uses_without(release) {
        needed |= CapabilitySet::BPF;
    }
    needed
}

/// Whether this Linux lets a process use its maps and programs without a capability. What cannot be
/// read is taken for an old one.
fn uses_without(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|word| word.parse::<u32>().ok());
    numbers.next().zip(numbers.next()).is_some_and(|version| version >= USES_WITHOUT)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use fence_config::{Source, Warnings};

    use super::*;

    fn config(text: &str) -> Config {
        fence_config::parse(&Source::new(Path::new("f"), text.as_bytes()), Warnings::default()).unwrap().0
    }

    fn with(settings: &str, listener: &str, uri: &str) -> Config {
        config(&format!(
            "fence_virtd {{ listener = \"{listener}\"; backend = \"libvirt\"; {settings} }}\n\
             listeners {{ multicast {{ hash = \"none\"; auth = \"none\"; }} tcp {{ hash = \"none\"; port = \"999\"; }} }}\n\
             backends {{ libvirt {{ uri = \"{uri}\"; }} }}"
        ))
    }

    #[test]
    fn only_what_the_configuration_needs_is_kept() {
        let usual = with("", "multicast", "qemu:///system");
        let more = |config: &Config, release: &str, locks: bool| needed(config, release, locks).difference(TO_FENCE);
        assert_eq!(more(&usual, "6.1.0-56-amd64", true), CapabilitySet::empty());
        assert_eq!(more(&usual, "5.19.1", true), CapabilitySet::empty());
        assert_eq!(more(&usual, "5.18.0", true), CapabilitySet::BPF);
        assert_eq!(more(&usual, "", true), CapabilitySet::BPF);
        assert_eq!(more(&usual, "6.1", false), CapabilitySet::IPC_LOCK);
        assert_eq!(more(&with("lock_memory = \"no\";", "multicast", "lxc:///"), "6.1", false), CapabilitySet::empty());
        let low = with("", "multicast,tcp", "qemu:///system");
        assert_eq!(more(&low, "6.1", true), CapabilitySet::NET_BIND_SERVICE);
        let metrics = |place: &str| with(&format!("metrics {{ {place} }}"), "multicast", "test:///d");
        let at_port = metrics("address = \"127.0.0.1\"; port = \"99\";");
        assert_eq!(more(&at_port, "6.1", true), CapabilitySet::NET_BIND_SERVICE);
        assert_eq!(more(&metrics("path = \"/m.sock\";"), "6.1", true), CapabilitySet::empty());
        for (uri, starts) in
            [("qemu+ssh://host/system", true), ("an-alias", true), ("qemu+tls://h/system", false), ("test:///d", false)]
        {
            let kept = more(&with("", "multicast", uri), "6.1", true);
            assert_eq!(kept.contains(CapabilitySet::SETPCAP), starts, "{uri}");
        }
    }

    /// Threads keep what they have when another one gives it up, and inherit what is left.
    #[test]
    fn a_thread_gives_up_for_itself_and_its_children() {
        let of_this = || capabilities(None).unwrap().permitted;
        let before = of_this();
        let loader = Loader::start().unwrap();
        let inherited = thread::spawn(move || {
            keep_in_this_thread(TO_FENCE).unwrap();
            thread::spawn(of_this).join().unwrap()
        });
        assert_eq!(inherited.join().unwrap(), before & TO_FENCE);
        assert_eq!(of_this(), before);
        let (said, heard) = sync_channel(1);
        loader.run(move || said.send(of_this()).unwrap());
        assert_eq!(heard.try_recv().unwrap(), before & TO_LOAD);
    }
}
