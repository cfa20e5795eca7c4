//! Where a guide is played: hypervisors and nodes, by the names that the page has for them.
//!
//! Each hypervisor runs the real systemd ([`crate::systemd`]).

use std::collections::BTreeMap;
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::lab::Hypervisor;
use crate::process::{Finished, run};
use crate::qemu::LinuxGuest;
use crate::systemd::{Booted, ENVIRONMENT};
use crate::witness::Witness;
use anyhow::{Context, Result, anyhow, bail, ensure};
use fence_common::sync::lock;

use super::{Act, Guide, Step, Typed, compare};

/// The hypervisor's name in guides that have one.
pub const HYPERVISOR: &str = "hypervisor";
/// What stands for every hypervisor in guides that have several.
pub const HOSTS: &str = "hosts";
/// What stands for every node in guides.
pub const NODES: &str = "nodes";
/// How long a command may take, or be typed again, on a loaded machine.
const LIMIT: Duration = Duration::from_secs(240);
/// Runs a command as somebody who is not root.
const AS_USER: [&str; 5] = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--"];

/// A machine of a guide.
#[derive(Clone, Debug)]
struct Place {
    /// The lab's hypervisor that it is, or that it runs on.
    hypervisor: Hypervisor,
    system: MachineSystem,
}

/// What a machine of a guide is made of.
#[derive(Clone, Debug)]
enum MachineSystem {
    /// Booted by systemd.
    Host(Arc<Booted>),
    /// The container of this domain.
    Container(String),
    /// A QEMU guest, whose shell is busybox's.
    Guest(Arc<Mutex<LinuxGuest>>),
}

/// The machines of a guide.
#[derive(Clone, Debug, Default)]
pub struct Stage {
    places: BTreeMap<String, Place>,
}

impl Stage {
    /// A stage with the hypervisor on it.
    #[must_use]
    pub fn new(hypervisor: Booted) -> Self {
        let mut stage = Self::default();
        stage.add_host(HYPERVISOR, hypervisor);
        stage
    }

    /// Adds a hypervisor.
    pub fn add_host(&mut self, name: &str, host: Booted) {
        let hypervisor = host.hypervisor().clone();
        self.add(name, &hypervisor, MachineSystem::Host(Arc::new(host)));
    }

    /// Adds a machine that is the container of a domain, which need not run yet.
    pub fn add_container(&mut self, name: &str, hypervisor: &Hypervisor, domain: &str) {
        self.add(name, hypervisor, MachineSystem::Container(domain.to_owned()));
    }

    /// Adds a machine that is a QEMU guest and runs.
    pub fn add_guest(&mut self, name: &str, hypervisor: &Hypervisor, guest: LinuxGuest) {
        self.add(name, hypervisor, MachineSystem::Guest(Arc::new(Mutex::new(guest))));
    }

    fn add(&mut self, name: &str, hypervisor: &Hypervisor, system: MachineSystem) {
        self.places.insert(name.to_owned(), Place { hypervisor: hypervisor.clone(), system });
    }

    /// The names that the page may use.
    #[must_use]
    pub fn hosts(&self) -> Vec<&str> {
        self.places.keys().map(String::as_str).chain([HOSTS, NODES]).collect()
    }

    /// The machines that a name stands for.
    fn meant<'a>(&'a self, name: &'a str) -> Vec<&'a str> {
        let those = |are_hosts: bool| {
            let of_kind = move |place: &Place| matches!(place.system, MachineSystem::Host(_)) == are_hosts;
            self.places.iter().filter(move |(_, place)| of_kind(place)).map(|(name, _)| name.as_str()).collect()
        };
        match name {
            HOSTS => those(true),
            NODES => those(false),
            one => vec![one],
        }
    }

    /// Puts a program onto a machine.
    pub fn install(&self, name: &str, path: &str, content: &[u8]) -> Result<()> {
        self.write(name, path, content)?;
        let file = self.file(name, path)?;
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755))
            .with_context(|| file.display().to_string())
    }

    /// Does all that a page says, in its order.
    pub fn play(&self, guide: &Guide) -> Result<()> {
        guide.steps.iter().try_for_each(|step| self.step(step))
    }

    /// Does one thing that a page says.
    pub fn step(&self, step: &Step) -> Result<()> {
        let places = self.meant(&step.host);
        ensure!(!places.is_empty(), "line {}: there are no {}", step.line, step.host);
        // On all of them at once: nodes have each to wait for themselves.
        std::thread::scope(|scope| {
            let doing: Vec<_> = places.iter().map(|&place| scope.spawn(move || self.step_at(place, step))).collect();
            doing.into_iter().try_for_each(|one| one.join().map_err(|_| anyhow!("a thread panicked"))?)
        })
        .with_context(|| format!("line {} of the page", step.line))
    }

    fn step_at(&self, place: &str, step: &Step) -> Result<()> {
        let begun = Instant::now();
        match &step.act {
            Act::Write(path, content) => self.write(place, path, content.as_bytes()),
            Act::Type(typed) => {
                let done = self.follow(place, typed);
                eprintln!("{:>6.2} s  {place}# {}", begun.elapsed().as_secs_f64(), typed.command);
                done
            }
        }
    }

    fn follow(&self, place: &str, typed: &Typed) -> Result<()> {
        let begun = Instant::now();
        loop {
            // A machine that is off has nobody to type anything on it.
            let wrong = match self.run(place, typed) {
                Ok(done) => match judge(typed, &done) {
                    Ok(()) => return Ok(()),
                    Err(error) => error,
                },
                Err(error) => error,
            };
            if !typed.again || begun.elapsed() > LIMIT {
                bail!("{wrong:#}");
            }
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// Types a command; standard error comes where a terminal would show it, in standard output.
    fn run(&self, place: &str, typed: &Typed) -> Result<Finished> {
        let Typed { user, directory, command, .. } = typed;
        // `~` is the shell's business.
        let line = format!("cd {directory} && {{ {command}\n}} 2>&1");
        self.shell(place, user, &line).with_context(|| command.clone())
    }

    /// Runs a line of shell on a machine.
    pub fn shell(&self, place: &str, user: &str, line: &str) -> Result<Finished> {
        let Place { hypervisor, system } = self.place(place)?;
        let through = if user == "root" { &[][..] } else { &AS_USER };
        match system {
            MachineSystem::Host(booted) => booted.shell(through, line, LIMIT),
            MachineSystem::Container(domain) => {
                let init = Witness::of_container(hypervisor, domain)?;
                let space = hypervisor.space().inside(init.as_fd().try_clone_to_owned()?);
                let mut command = Command::new("env");
                run(&space, command.arg("-i").args(ENVIRONMENT).args(through).args(["bash", "-c", line]), LIMIT)
            }
            MachineSystem::Guest(guest) => {
                ensure!(user == "root", "there is only root");
                // Its commands are single lines.
                lock(guest).command(&line.replace('\n', "; "), LIMIT)
            }
        }
    }

    /// Writes a file of a machine; directories are made.
    pub fn write(&self, place: &str, path: &str, content: &[u8]) -> Result<()> {
        let file = self.file(place, path)?;
        let written = || -> std::io::Result<()> {
            std::fs::create_dir_all(file.parent().unwrap_or(Path::new("/")))?;
            std::fs::write(&file, content)
        };
        written().with_context(|| format!("writing {}", file.display()))
    }

    /// A machine's file, for this process.
    fn file(&self, place: &str, path: &str) -> Result<PathBuf> {
        let Place { hypervisor, system } = self.place(place)?;
        Ok(match system {
            MachineSystem::Host(booted) => hypervisor.outside(&format!("{}{path}", booted.root())),
            MachineSystem::Container(domain) => {
                let init = Witness::of_container(hypervisor, domain)?;
                PathBuf::from(format!("/proc/{}/root{path}", init.pid))
            }
            MachineSystem::Guest(_) => bail!("{place} has its files in its memory"),
        })
    }

    /// Kills all that runs on a hypervisor.
    pub fn cut_power(&self, name: &str) -> Result<()> {
        match &self.place(name)?.system {
            MachineSystem::Host(booted) => booted.cut_power(),
            MachineSystem::Container(_) | MachineSystem::Guest(_) => bail!("{name} is no hypervisor"),
        }
    }

    /// Whether there is such a machine.
    pub fn has(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    fn place(&self, name: &str) -> Result<&Place> {
        self.places.get(name).with_context(|| format!("there is no machine {name}"))
    }
}

/// Whether a command did what is shown.
fn judge(typed: &Typed, done: &Finished) -> Result<()> {
    let Typed { command, shown, .. } = typed;
    let is_as_shown = match done.code {
        Some(0) => compare(shown, &done.stdout),
        code => Err(anyhow!("exit code {code:?}")),
    };
    is_as_shown.map_err(|error| {
        anyhow!("{error}: {command}\n--- shown\n{}\n--- printed\n{}{}", shown.join("\n"), done.stdout, done.stderr)
    })
}
