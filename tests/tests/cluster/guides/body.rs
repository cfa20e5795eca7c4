//! The operating system of a machine: it starts with the machine and dies with it.
//!
//! Without KVM two Linux guests take minutes for the commands of a page. So the machine is a QEMU
//! domain with firmware alone. Its operating system is a container beside it, whose first process
//! is killed as soon as the machine's process is dead.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_lab::cluster::node::Node;
use fence_lab::cluster::shell::Shell as _;
use fence_lab::container::URI;
use fence_lab::lab::COMMAND_LIMIT;
use fence_lab::process::{Finished, run};
use fence_lab::witness::Witness;

/// The pause between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// The operating system of a machine. Dropping it leaves the machine alone.
pub(crate) struct Body {
    node: Node,
    is_wanted: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Body {
    /// The container of `node`, as the operating system of the domain `machine`.
    pub(crate) fn of(machine: &str, node: Node) -> Self {
        let is_wanted = Arc::new(AtomicBool::new(true));
        let life = Life { machine: machine.to_owned(), node: node.clone(), is_wanted: Arc::clone(&is_wanted) };
        Self { node, is_wanted, thread: Some(std::thread::spawn(move || life.live())) }
    }

    /// Waits until the container's init has started everything.
    pub(crate) fn wait_up(&self) -> Result<()> {
        self.node.wait_up()
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        self.is_wanted.store(false, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

struct Life {
    machine: String,
    node: Node,
    is_wanted: Arc<AtomicBool>,
}

impl Life {
    fn live(&self) {
        while self.is_wanted.load(Ordering::Relaxed) {
            if let Err(error) = self.once() {
                eprintln!("{}'s body: {error:#}", self.machine);
                std::thread::sleep(PAUSE);
            }
        }
    }

    /// Follows one life of the machine, from its start to its end.
    fn once(&self) -> Result<()> {
        let hypervisor = self.node.hypervisor();
        let Ok(machine) = Witness::of_qemu(hypervisor, &self.machine) else {
            std::thread::sleep(PAUSE);
            return Ok(());
        };
        let lived = self.beside(&machine);
        // A container that is left over would never be started for the machine's next life.
        while self.is_wanted.load(Ordering::Relaxed) && self.virsh("domstate")?.stdout.trim() == "running" {
            // The container may have ended since the query.
            let _ = self.virsh("destroy");
            std::thread::sleep(PAUSE);
        }
        lived
    }

    /// Runs the container until the machine is dead, or the container has ended by itself.
    fn beside(&self, machine: &Witness) -> Result<()> {
        self.virsh("start")?.success().context("the container does not start")?;
        let first = self.node.witness()?;
        while !machine.dies_within(PAUSE)? {
            if !self.is_wanted.load(Ordering::Relaxed) || first.is_dead()? {
                return Ok(());
            }
        }
        // The container may be dead already.
        let _ = first.kill();
        ensure!(first.dies_within(COMMAND_LIMIT)?, "the container's init does not die");
        Ok(())
    }

    fn virsh(&self, verb: &str) -> Result<Finished> {
        let mut command = Command::new("virsh");
        command.args(["-q", "-c", URI, verb, &self.node.member().domain]);
        run(self.node.hypervisor().space(), &mut command, COMMAND_LIMIT)
    }
}
