//! Where a guide is played: labs' hypervisors, each in a root directory of its own, and nodes, by the names that the page has for them.
//!
//! Nothing of this machine is written to: a hypervisor's root is the nodes' image under a layer in memory, with the lab's processes,
//! interfaces and libvirt in it. Where a page's command cannot be what it says in a lab, a script of the same name stands in for it
//! ([`STAND_INS`]), and the page's last section says so.

use std::collections::BTreeMap;
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::{Act, Guide, Step, Typed, compare};
use crate::lab::{Hypervisor, Space};
use crate::process::{Finished, Process, poll_until, run};
use crate::witness::Witness;

/// The hypervisor's name in guides that have one.
pub const HYPERVISOR: &str = "hypervisor";
/// What stands for every hypervisor in guides that have several.
pub const HOSTS: &str = "hosts";
/// What stands for every node in guides.
pub const NODES: &str = "nodes";
/// How long a command may take, or be typed again, on a loaded machine.
const LIMIT: Duration = Duration::from_secs(240);
/// What a shell that somebody logged in to has.
const ENVIRONMENT: &[&str] =
    &["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C", "COLUMNS=200"];

/// Commands of the hypervisor that are scripts here: path, script, and why.
pub const STAND_INS: &[(&str, &str, &str)] = &[
    ("/usr/bin/systemctl", include_str!("../assets/guide/systemctl.sh"), "a lab's first process is not systemd"),
    ("/usr/local/bin/cargo", include_str!("../assets/guide/cargo.sh"), "a release build takes minutes"),
    ("/usr/bin/scp", include_str!("../assets/guide/scp.sh"), "the nodes have no SSH server"),
    ("/usr/bin/mmdebstrap", include_str!("../assets/guide/mmdebstrap.sh"), "it was run already: the image is its work"),
];

/// A machine of a guide.
#[derive(Clone, Debug)]
struct Place {
    /// The lab's hypervisor that it is, or that it runs on.
    hypervisor: Hypervisor,
    system: System,
}

/// What a machine of a guide is made of.
#[derive(Clone, Debug)]
enum System {
    /// This directory as root directory, with the hypervisor's network.
    Host(String),
    /// This directory as root directory, in this space of the lab.
    Guest(Space, String),
    /// The container of this domain.
    Container(String),
}

/// What the stand-in for systemctl runs services by.
const IN_JOURNAL: &str = include_str!("../assets/guide/in-journal.py");

/// The journal of a machine without systemd: in memory, and without what the kernel says of the real machine.
const JOURNALD_CONF: &str = "[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=no\nRateLimitBurst=0\n";

/// Starts systemd's journal in the root directory `$0`. It wants to see cgroups, and nobody else is to see them there.
const JOURNALD: &str = "mkdir -p /run/systemd/journal /run/log/journal
rm -f \"$0/etc/machine-id\"
tr -d - < /proc/sys/kernel/random/uuid > \"$0/etc/machine-id\"
mount --rbind /sys/fs/cgroup \"$0/sys/fs/cgroup\"
exec chroot \"$0\" /lib/systemd/systemd-journald";

/// The machines of a guide.
#[derive(Debug, Default)]
pub struct Stage {
    places: BTreeMap<String, Place>,
    /// The hypervisors' journals.
    journals: Vec<Process>,
}

impl Stage {
    /// A stage with the hypervisor on it.
    ///
    /// # Errors
    /// The kernel refuses the mounts.
    pub fn new(hypervisor: &Hypervisor, image: &Path) -> Result<Self> {
        let mut stage = Self::default();
        stage.add_host(HYPERVISOR, hypervisor, image)?;
        Ok(stage)
    }

    /// Adds a hypervisor.
    ///
    /// # Errors
    /// The kernel refuses the mounts.
    pub fn add_host(&mut self, name: &str, hypervisor: &Hypervisor, image: &Path) -> Result<()> {
        let root = make_root(hypervisor, name, hypervisor.space(), image, "hypervisor")?;
        self.add(name, hypervisor, System::Host(root.clone()));
        self.install_stand_ins(name)?;
        self.start_journal(name, hypervisor, &root)
    }

    /// Adds a machine that is a network of the hypervisor's lab, with a root directory of its own made of the image.
    ///
    /// # Errors
    /// The kernel refuses the mounts.
    pub fn add_guest(&mut self, name: &str, hypervisor: &Hypervisor, space: &Space, image: &Path) -> Result<()> {
        let root = make_root(hypervisor, name, space, image, "guest")?;
        self.add(name, hypervisor, System::Guest(space.clone(), root));
        self.install_stand_ins(name)
    }

    /// Adds a machine that is the container of a domain, which need not run yet.
    pub fn add_container(&mut self, name: &str, hypervisor: &Hypervisor, domain: &str) {
        self.add(name, hypervisor, System::Container(domain.to_owned()));
    }

    fn add(&mut self, name: &str, hypervisor: &Hypervisor, system: System) {
        self.places.insert(name.to_owned(), Place { hypervisor: hypervisor.clone(), system });
    }

    /// Starts the real journal on a hypervisor, which has no systemd that would.
    fn start_journal(&mut self, name: &str, hypervisor: &Hypervisor, root: &str) -> Result<()> {
        self.install(name, "/run/guide/in-journal", IN_JOURNAL.as_bytes())?;
        self.write(name, "/etc/systemd/journald.conf.d/lab.conf", JOURNALD_CONF.as_bytes())?;
        let mut journal = Process::start(
            hypervisor.space(),
            Command::new("unshare").args(["--mount", "--propagation", "private", "sh", "-euc", JOURNALD, root]),
        )?;
        poll_until("the journal", LIMIT, || {
            ensure!(journal.is_running()?, "it has ended");
            Ok(hypervisor.outside("/run/systemd/journal/stdout").exists().then_some(()))
        })
        .with_context(|| journal.stderr().text())?;
        self.journals.push(journal);
        Ok(())
    }

    fn install_stand_ins(&self, name: &str) -> Result<()> {
        STAND_INS.iter().try_for_each(|(path, script, _)| self.install(name, path, script.as_bytes()))
    }

    /// The names that the page may use.
    #[must_use]
    pub fn hosts(&self) -> Vec<&str> {
        self.places.keys().map(String::as_str).chain([HOSTS, NODES]).collect()
    }

    /// The machines that a name stands for.
    fn meant<'a>(&'a self, name: &'a str) -> Vec<&'a str> {
        let those = |are_hosts: bool| {
            let of_kind = move |place: &Place| matches!(place.system, System::Host(_)) == are_hosts;
            self.places.iter().filter(move |(_, place)| of_kind(place)).map(|(name, _)| name.as_str()).collect()
        };
        match name {
            HOSTS => those(true),
            NODES => those(false),
            one => vec![one],
        }
    }

    /// Puts a program onto a machine.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn install(&self, name: &str, path: &str, content: &[u8]) -> Result<()> {
        self.write(name, path, content)?;
        let file = self.file(name, path)?;
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755))
            .with_context(|| file.display().to_string())
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
    ///
    /// # Errors
    /// The machine does not run, or the line does not end.
    pub fn shell(&self, place: &str, user: &str, line: &str) -> Result<Finished> {
        let Place { hypervisor, system } = self.place(place)?;
        let in_root = |space: &Space, root: &String| (space.clone(), vec!["chroot".to_owned(), root.clone()]);
        let (space, mut words) = match system {
            System::Host(root) => in_root(hypervisor.space(), root),
            System::Guest(space, root) => in_root(space, root),
            System::Container(domain) => {
                let init = Witness::of_container(hypervisor, domain)?;
                (hypervisor.space().inside(init.as_fd().try_clone_to_owned()?), Vec::new())
            }
        };
        words.extend(["env", "-i"].map(str::to_owned));
        words.extend(ENVIRONMENT.iter().map(|&variable| variable.to_owned()));
        if user != "root" {
            words.extend(["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--"].map(str::to_owned));
        }
        words.extend(["bash", "-c", line].map(str::to_owned));
        run(&space, Command::new(&words[0]).args(&words[1..]), LIMIT)
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
        let Place { hypervisor, system } = self.place(place)?;
        Ok(match system {
            System::Host(root) | System::Guest(_, root) => hypervisor.outside(&format!("{root}{path}")),
            System::Container(domain) => {
                let init = Witness::of_container(hypervisor, domain)?;
                PathBuf::from(format!("/proc/{}/root{path}", init.pid))
            }
        })
    }

    fn place(&self, name: &str) -> Result<&Place> {
        self.places.get(name).with_context(|| format!("there is no machine {name}"))
    }
}

/// Makes a root directory of the image, for programs in this space: its path in the lab.
fn make_root(hypervisor: &Hypervisor, name: &str, space: &Space, image: &Path, kind: &str) -> Result<String> {
    let root = hypervisor.path(&format!("roots/{name}"));
    let (image, written) = (image.to_string_lossy(), format!("{root}-written"));
    let script = include_str!("../assets/guide/root.sh");
    space.must("sh", &["-c", script, "sh", &image, &root, &written, kind])?;
    Ok(root)
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
