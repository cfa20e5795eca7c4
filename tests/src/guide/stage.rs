//! Where a guide is played: a lab's hypervisor in a root directory of its own, and nodes, each by the name that the page has for it.
//!
//! Nothing of this machine is written to: the hypervisor's root is the nodes' image under a layer in memory, with the lab's processes,
//! interfaces and libvirt in it. Where a page's command cannot be what it says in a lab, a script of the same name stands in for it
//! ([`STAND_INS`]), and the page's last section says so.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{Act, Guide, Step, Typed, compare};
use crate::lab::{Hypervisor, Space};
use crate::process::{Finished, run};

/// The hypervisor's name in guides.
pub const HYPERVISOR: &str = "hypervisor";
/// What stands for every node in guides.
pub const NODES: &str = "nodes";
/// How long a command may take, or be typed again, on a loaded machine.
const LIMIT: Duration = Duration::from_secs(240);
/// Where the hypervisor's root is, for the lab's programs.
const ROOT: &str = "/run/lab/hypervisor";
/// What a shell that somebody logged in to has.
const ENVIRONMENT: &[&str] =
    &["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C", "COLUMNS=200"];

/// Commands of the hypervisor that are scripts here: path, script, and why.
pub const STAND_INS: &[(&str, &str, &str)] = &[
    ("/usr/bin/systemctl", include_str!("../assets/guide/systemctl.sh"), "a lab's first process is not systemd"),
    ("/usr/bin/journalctl", include_str!("../assets/guide/journalctl.sh"), "there is no journal without systemd"),
    ("/usr/local/bin/cargo", include_str!("../assets/guide/cargo.sh"), "a release build takes minutes"),
    ("/usr/bin/scp", include_str!("../assets/guide/scp.sh"), "the nodes have no SSH server"),
    ("/usr/bin/mmdebstrap", include_str!("../assets/guide/mmdebstrap.sh"), "it was run already: the image is its work"),
];

/// A machine of a guide.
#[derive(Clone, Debug)]
enum Place {
    /// This directory as root directory, in this space of the lab.
    Root(Space, String),
    /// The container of this domain.
    Container(String),
}

/// The machines of a guide.
#[derive(Debug)]
pub struct Stage {
    hypervisor: Hypervisor,
    places: BTreeMap<String, Place>,
}

impl Stage {
    /// A stage with the hypervisor on it.
    ///
    /// # Errors
    /// The kernel refuses the mounts.
    pub fn new(hypervisor: &Hypervisor, image: &Path) -> Result<Self> {
        let mut stage = Self { hypervisor: hypervisor.clone(), places: BTreeMap::new() };
        stage.add_root(HYPERVISOR, hypervisor.space(), image, ROOT)?;
        for (path, script, _) in STAND_INS {
            stage.install(HYPERVISOR, path, script.as_bytes())?;
        }
        Ok(stage)
    }

    /// Adds a machine that is a network of the lab, with a root directory of its own made of the image.
    ///
    /// # Errors
    /// The kernel refuses the mounts.
    pub fn add_network(&mut self, name: &str, space: &Space, image: &Path) -> Result<()> {
        self.add_root(name, space, image, &format!("/run/lab/{name}"))
    }

    fn add_root(&mut self, name: &str, space: &Space, image: &Path, root: &str) -> Result<()> {
        let (image, written) = (image.to_string_lossy(), format!("{root}-written"));
        let script = include_str!("../assets/guide/hypervisor.sh");
        space.must("sh", &["-c", script, "sh", &image, root, &written])?;
        self.places.insert(name.to_owned(), Place::Root(space.clone(), root.to_owned()));
        Ok(())
    }

    /// Adds a machine that is the container of a domain, which need not run yet.
    pub fn add_container(&mut self, name: &str, domain: &str) {
        self.places.insert(name.to_owned(), Place::Container(domain.to_owned()));
    }

    /// The names that the page may use.
    #[must_use]
    pub fn hosts(&self) -> Vec<&str> {
        self.places.keys().map(String::as_str).chain([NODES]).collect()
    }

    /// Puts a program onto a machine.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn install(&self, name: &str, path: &str, content: &[u8]) -> Result<()> {
        self.write(name, path, content)?;
        let file = self.file(name, path)?;
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).with_context(|| file.display().to_string())
    }

    /// Does all that a page says, in its order.
    ///
    /// # Errors
    /// A command fails, or prints something else than is shown.
    pub fn play(&self, guide: &Guide) -> Result<()> {
        guide.steps.iter().try_for_each(|step| self.step(step))
    }

    /// Does one thing that a page says.
    ///
    /// # Errors
    /// As [`Self::play`].
    pub fn step(&self, step: &Step) -> Result<()> {
        let nodes = self.places.keys().filter(|name| *name != HYPERVISOR).map(String::as_str);
        let places: Vec<_> = if step.host == NODES { nodes.collect() } else { vec![step.host.as_str()] };
        ensure!(!places.is_empty(), "line {}: there are no nodes", step.line);
        for place in places {
            let begun = Instant::now();
            match &step.act {
                Act::Write(path, content) => self.write(place, path, content.as_bytes())?,
                Act::Type(typed) => self.follow(place, typed).with_context(|| format!("line {}", step.line))?,
            }
            if let Act::Type(typed) = &step.act {
                println!("{:>6.2} s  {place}# {}", begun.elapsed().as_secs_f64(), typed.command);
            }
        }
        Ok(())
    }

    fn follow(&self, place: &str, typed: &Typed) -> Result<()> {
        let begun = Instant::now();
        loop {
            let done = self.run(place, typed)?;
            let is_as_shown = match done.code {
                Some(0) => compare(&typed.shown, &done.stdout),
                code => Err(anyhow::anyhow!("exit code {code:?}")),
            };
            match is_as_shown {
                Ok(()) => return Ok(()),
                Err(_) if typed.again && begun.elapsed() < LIMIT => std::thread::sleep(Duration::from_millis(300)),
                Err(error) => {
                    let (command, shown, printed) = (&typed.command, typed.shown.join("\n"), &done.stdout);
                    bail!("{error:#}\n{place}# {command}\n--- shown\n{shown}\n--- printed\n{printed}");
                }
            }
        }
    }

    /// Types a command; standard error comes where a terminal would show it, in standard output.
    fn run(&self, place: &str, typed: &Typed) -> Result<Finished> {
        let Typed { user, directory, command, .. } = typed;
        // `~` is the shell's business.
        let line = format!("cd {directory} && {{ {command}\n}} 2>&1");
        self.shell(place, user, &line).with_context(|| format!("{place}# {command}"))
    }

    /// Runs a line of shell on a machine.
    ///
    /// # Errors
    /// The machine does not run, or the line does not end.
    pub fn shell(&self, place: &str, user: &str, line: &str) -> Result<Finished> {
        let (space, mut words) = match self.place(place)? {
            Place::Root(space, root) => (space, vec!["chroot".to_owned(), root.clone()]),
            Place::Container(domain) => {
                let init = self.init(domain)?.to_string();
                let words = ["nsenter", "--target", &init, "--all", "--root", "--wd", "--"].map(str::to_owned);
                (self.hypervisor.space(), words.to_vec())
            }
        };
        words.extend(["env", "-i"].map(str::to_owned));
        words.extend(ENVIRONMENT.iter().map(|&variable| variable.to_owned()));
        if user != "root" {
            words.extend(["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--"].map(str::to_owned));
        }
        words.extend(["bash", "-c", line].map(str::to_owned));
        run(space, Command::new(&words[0]).args(&words[1..]), LIMIT)
    }

    /// Writes a file of a machine; directories are made.
    ///
    /// # Errors
    /// The machine does not run, or the file cannot be written.
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
        let inside = match self.place(place)? {
            Place::Root(_, root) => format!("{root}{path}"),
            Place::Container(domain) => format!("/proc/{}/root{path}", self.init(domain)?),
        };
        Ok(self.hypervisor.outside(&inside))
    }

    fn place(&self, name: &str) -> Result<&Place> {
        self.places.get(name).with_context(|| format!("there is no machine {name}"))
    }

    /// The first process of a container, by the lab's numbers.
    fn init(&self, domain: &str) -> Result<u32> {
        let read = |path: String| {
            std::fs::read_to_string(self.hypervisor.outside(&path)).with_context(|| format!("{domain} does not run"))
        };
        let controller = read(format!("/run/libvirt/lxc/{domain}.pid"))?;
        let controller = controller.trim();
        let children = read(format!("/proc/{controller}/task/{controller}/children"))?;
        children.split_whitespace().next().and_then(|pid| pid.parse().ok()).with_context(|| format!("{domain} has no process"))
    }
}
