//! The processes that libvirt starts beside a domain's QEMU: virtiofsd, nbdkit, swtpm,
//! qemu-pr-helper, passt and the like.
//!
//! Some of them write for the guest, and none has a purpose without it. So a fence kills them all.
//! They are found by what they are, never by their name:
//!
//! - they are in the machine's control group, where libvirt puts them; or
//! - one of libvirt's PID files for this instance names them: `ID-NAME-...pid` below
//!   `/run/libvirt/qemu`, or any PID file in the instance's own directory. Such a file may be stale
//!   and its number be another process's. So the process must have been started before the file was
//!   written, and must not be in another machine's control group; or
//! - they descend from QEMU or from another helper: virtiofsd works in a child.
//!
//! A server that somebody else has started (`vhostuser`, `<source socket=...>`) is no helper:
//! others may use it (see [`disks`](super::disks)).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::super::pidfd::Process;
use super::super::proc::{START_SLACK, Stat};

/// Where libvirt's QEMU driver keeps its PID files.
const RUN: &str = "/run/libvirt/qemu";
/// Where it keeps a directory for each instance.
const LIB: &str = "/var/lib/libvirt/qemu";
/// How many characters of a domain's name libvirt puts into such names
/// (`VIR_DOMAIN_SHORT_NAME_MAX`).
const SHORT: usize = 20;
/// How many generations of children are looked at.
const GENERATIONS: usize = 8;

/// Which process it is, for this daemon and the next. A number can come to mean another process, a
/// number with a start cannot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Who {
    pid: i32,
    /// In clock ticks since the host's boot.
    started: u64,
}

/// A helper, held.
#[derive(Clone, Debug)]
pub(crate) struct Helper {
    pub(super) who: Who,
    /// Its program's name, for people.
    pub(crate) name: String,
    pub(crate) process: Arc<Process>,
}

impl Helper {
    /// Opens a process that is a helper if `is_it` says so. It is asked after the process is held.
    fn open(pid: i32, is_it: impl FnOnce(&Stat) -> bool) -> Option<Self> {
        let process = Process::open(pid).ok()?;
        let stat = Stat::read(&directory(pid)).ok()??;
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned();
        // It is alive after all that, so it was this very process that was looked at.
        (is_it(&stat) && !process.is_dead()).then(|| Self {
            who: Who { pid, started: stat.started },
            name,
            process: Arc::new(process),
        })
    }

    /// The process that another daemon has known as a helper, if it lives.
    pub(super) fn again(who: &Who) -> Option<Self> {
        Self::open(who.pid, |stat| stat.started == who.started)
    }

    /// Its number and program, for people.
    pub(crate) fn describe(&self) -> String {
        format!("{} ({})", self.process.pid(), self.name.escape_debug())
    }
}

/// Where an instance's helpers are to be found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Whereabouts {
    /// The directories of its control group, one in each hierarchy. The first one has all of its
    /// processes.
    groups: Vec<PathBuf>,
    /// How libvirt begins the names of its files: `ID-NAME`.
    short: String,
}

impl Whereabouts {
    /// Those of the instance `id` of a domain whose emulator is this process.
    pub(super) fn of(pid: i32, id: u32, name: &str) -> Self {
        let groups = groups(pid).unwrap_or_default();
        Self { groups, short: format!("{id}-{}", name.chars().take(SHORT).collect::<String>()) }
    }

    /// All helpers that live. Those in `known` are not opened again. `emulator` is QEMU itself.
    pub(super) fn helpers(&self, emulator: i32, known: &[Helper]) -> Vec<Helper> {
        let mut found: BTreeMap<i32, Helper> =
            known.iter().map(|helper| (helper.process.pid(), helper.clone())).collect();
        let mut add = |helper: Option<Helper>| {
            if let Some(helper) = helper.filter(|helper| helper.process.pid() != emulator) {
                found.entry(helper.process.pid()).or_insert(helper);
            }
        };
        for pid in self.members() {
            add(Helper::open(pid, |_| self.has_member(pid)));
        }
        for file in self.pid_files() {
            let Some(pid) = number_in(&file) else { continue };
            add(Helper::open(pid, |stat| number_in(&file) == Some(pid) && self.is_named_rightly(&file, pid, stat)));
        }
        let mut found: Vec<_> = found.into_values().collect();
        add_descendants(&[emulator], &mut found);
        let mut found = with_children(found);
        found.retain(|helper| helper.process.pid() != emulator && !helper.process.is_dead());
        found
    }

    /// Those of `known` that live, and whatever else lives in the control group. `emulator` is QEMU
    /// itself.
    pub(super) fn living(&self, emulator: i32, known: Vec<Helper>) -> Vec<Helper> {
        let mut living = known;
        for pid in self.members() {
            let is_known = |helper: &Helper| helper.process.pid() == pid && !helper.process.is_dead();
            if pid != emulator && !living.iter().any(is_known) {
                living.extend(Helper::open(pid, |_| self.has_member(pid)));
            }
        }
        living.retain(|helper| !helper.process.is_dead());
        living
    }

    /// The processes in the control group. A few small files are read.
    fn members(&self) -> Vec<i32> {
        let mut members = Vec::new();
        // One hierarchy is enough, and quick: libvirt puts a process into all, and every fence
        // asks.
        self.groups.first().into_iter().for_each(|group| add_members(group, &mut members));
        members.sort_unstable();
        members.dedup();
        members
    }

    /// Asked of the group, since a process whose first thread has ended names another one.
    fn has_member(&self, pid: i32) -> bool {
        self.members().contains(&pid)
    }

    /// libvirt's PID files for this instance.
    fn pid_files(&self) -> Vec<PathBuf> {
        let run = Path::new(RUN);
        let mut files = Vec::new();
        let subdirectories = entries(run).into_iter().filter(|path| path.is_dir());
        for directory in subdirectories.chain([run.to_owned()]) {
            let own = entries(&directory).into_iter().filter(|path| is_pid_file(path, Some(&self.short)));
            // A domain can have a name that looks like one of these. Its own PID file has libvirt's
            // record of the domain beside it.
            files.extend(own.filter(|path| !path.with_extension("xml").exists()));
        }
        let own = entries(&Path::new(LIB).join(format!("domain-{}", self.short)));
        files.extend(own.into_iter().filter(|path| is_pid_file(path, None)));
        files
    }

    /// Whether a process is the one that libvirt meant when it wrote its number.
    fn is_named_rightly(&self, file: &Path, pid: i32, stat: &Stat) -> bool {
        let written = fs::metadata(file).and_then(|about| about.modified());
        let in_time = written.is_ok_and(|written| stat.wall_clock() <= written + START_SLACK);
        let groups = groups(pid).unwrap_or_default();
        in_time && (groups.is_empty() || groups.iter().any(|group| self.groups.contains(group)))
    }
}

/// These helpers, with whatever descends from them.
pub(super) fn with_children(helpers: Vec<Helper>) -> Vec<Helper> {
    let parents: Vec<i32> = helpers.iter().map(|helper| helper.process.pid()).collect();
    let mut all = helpers;
    add_descendants(&parents, &mut all);
    all
}

/// Adds what descends from these processes and is not there yet.
fn add_descendants(parents: &[i32], found: &mut Vec<Helper>) {
    let mut parents = parents.to_vec();
    for _ in 0..GENERATIONS {
        let mut children = Vec::new();
        for parent in parents {
            for child in self::children(parent) {
                let is_new = !found.iter().any(|helper| helper.process.pid() == child && !helper.process.is_dead());
                if is_new && let Some(helper) = Helper::open(child, |_| self::children(parent).contains(&child)) {
                    found.push(helper);
                    children.push(child);
                }
            }
        }
        parents = children;
    }
}

/// Whether a path is that of a PID file, of an instance that libvirt calls so.
fn is_pid_file(path: &Path, short: Option<&str>) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let of_instance = short.is_none_or(|short| name.strip_prefix(short).is_some_and(|rest| rest.starts_with('-')));
    name.ends_with(".pid") && of_instance
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn number_in(file: &Path) -> Option<i32> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

fn directory(pid: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}"))
}

/// The children of all threads of a process.
fn children(pid: i32) -> Vec<i32> {
    let threads = entries(&directory(pid).join("task"));
    let lists = threads.into_iter().filter_map(|thread| fs::read_to_string(thread.join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>()).collect()
}

/// The directories of the machine's control group that a process is in, one in each hierarchy that
/// has one.
fn groups(pid: i32) -> io::Result<Vec<PathBuf>> {
    let own = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let mut groups: Vec<_> =
        own.lines().filter_map(|line| Some((rank(line), group_directory(line, &mounts)?))).collect();
    groups.sort();
    Ok(groups.into_iter().map(|(_, group)| group).collect())
}

/// How well a hierarchy knows a machine's processes. libvirt puts helpers into the hierarchies with
/// controllers, and never into systemd's own.
fn rank(line: &str) -> u8 {
    match line.split(':').nth(1) {
        Some("") => 1,
        Some(controllers) if controllers.starts_with("name=") => 2,
        Some(_) | None => 0,
    }
}

/// The directory of the machine's group, where its hierarchy is mounted. `line` is one of
/// `/proc/PID/cgroup`: `NUMBER:CONTROLLERS:PATH`.
fn group_directory(line: &str, mounts: &str) -> Option<PathBuf> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (controllers, path) = (fields.next()?, fields.next()?);
    let group = super::scope::group_of_machine(path)?;
    mounts.lines().find_map(|mount| {
        let (place, about) = mount.split_once(" - ")?;
        let mut place = place.split(' ').skip(3);
        let (root, point) = (place.next()?, place.next()?);
        let mut about = about.split(' ');
        let (kind, options) = (about.next()?, about.nth(1).unwrap_or_default());
        let is_it = match kind {
            "cgroup2" => controllers.is_empty(),
            "cgroup" => {
                !controllers.is_empty() && controllers.split(',').all(|one| options.split(',').any(|it| it == one))
            }
            _ => false,
        };
        let below = group.strip_prefix(root.trim_end_matches('/'))?;
        is_it.then(|| Path::new(point).join(below.trim_start_matches('/')))
    })
}

/// Adds the processes of a control group and of those below it.
fn add_members(group: &Path, members: &mut Vec<i32>) {
    // In a group of threads the file cannot be read: its processes are those of the group above.
    let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    members.extend(processes.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()).filter(|pid| *pid > 0));
    for below in fs::read_dir(group).into_iter().flatten().flatten() {
        let name = below.file_name();
        let name = name.to_string_lossy();
        // These have QEMU's own threads and nothing else, and there may be hundreds.
        let is_threads = ["vcpu", "iothread"].iter().any(|kind| name.starts_with(kind));
        if !is_threads && below.file_type().is_ok_and(|kind| kind.is_dir()) {
            add_members(&below.path(), members);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_group_is_found_where_its_hierarchy_is_mounted() {
        let unified = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate";
        let old = "31 23 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
                   32 23 0:28 /lab /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices";
        for (line, mounts, directory) in [
            (
                "0::/machine.slice/machine-qemu\\x2d1\\x2da.scope/libvirt/emulator",
                unified,
                Some("/sys/fs/cgroup/machine.slice/machine-qemu\\x2d1\\x2da.scope"),
            ),
            (
                "4:cpu,cpuacct:/machine/qemu-1-a.libvirt-qemu/emulator",
                old,
                Some("/sys/fs/cgroup/cpu/machine/qemu-1-a.libvirt-qemu"),
            ),
            (
                "5:devices:/lab/machine/qemu-1-a.libvirt-qemu",
                old,
                Some("/sys/fs/cgroup/devices/machine/qemu-1-a.libvirt-qemu"),
            ),
            ("5:freezer:/machine/qemu-1-a.libvirt-qemu", old, None),
            ("0::/system.slice/libvirtd.service", unified, None),
        ] {
            assert_eq!(group_directory(line, mounts).as_deref(), directory.map(Path::new), "{line}");
        }
    }

    #[test]
    fn the_members_of_a_group_are_found_at_every_depth() {
        let scratch = tempfile::tempdir().unwrap();
        let group = scratch.path().join("qemu-1-a.libvirt-qemu");
        for (below, processes) in [("", "7\n"), ("libvirt/emulator", "9\n8\n"), ("libvirt/vcpu0", "7\n")] {
            fs::create_dir_all(group.join(below)).unwrap();
            fs::write(group.join(below).join("cgroup.procs"), processes).unwrap();
        }
        let places = Whereabouts { groups: vec![group], short: "1-a".to_owned() };
        assert_eq!(places.members(), [7, 8, 9]);
        assert!(rank("4:cpu,cpuacct:/x") < rank("0::/x") && rank("0::/x") < rank("1:name=systemd:/x"));
    }

    #[test]
    fn a_pid_file_is_one_of_the_instance_by_its_whole_beginning() {
        let of = |name: &str, short| is_pid_file(Path::new(name), Some(short));
        assert!(of("/run/libvirt/qemu/3-node1-fs0-fs.pid", "3-node1"));
        assert!(!of("/run/libvirt/qemu/13-node1-fs0-fs.pid", "3-node1"));
        assert!(!of("/run/libvirt/qemu/3-node10-fs0-fs.pid", "3-node1"));
        assert!(!of("/run/libvirt/qemu/3-node1-fs0-fs.sock", "3-node1"));
        assert!(is_pid_file(Path::new("pr-helper0.pid"), None));
    }

    #[test]
    fn a_helper_is_known_again_by_its_start_and_its_children_are_found() {
        let mut parent = std::process::Command::new("sh").args(["-c", "sleep 600 & wait"]).spawn().unwrap();
        let pid = i32::try_from(parent.id()).unwrap();
        let places = Whereabouts { groups: Vec::new(), short: "7-no-such-domain".to_owned() };
        let begun = std::time::Instant::now();
        let helpers = loop {
            let helpers = places.helpers(pid, &[]);
            if helpers.len() == 1 && helpers[0].name == "sleep" || begun.elapsed() > Duration::from_secs(20) {
                break helpers;
            }
        };
        assert_eq!(helpers.len(), 1, "{helpers:?}");
        let Who { pid, started } = helpers[0].who.clone();
        assert!(Helper::again(&Who { pid, started }).is_some());
        assert!(Helper::again(&Who { pid, started: started + 1 }).is_none(), "another process has its number");
        helpers[0].process.kill().unwrap();
        parent.wait().unwrap();
        assert!(Helper::again(&Who { pid, started }).is_none());
    }

    #[test]
    fn a_left_over_pid_file_names_nobody() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("pr-helper0.pid");
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        fs::write(&file, pid.to_string()).unwrap();
        let places = Whereabouts { groups: Vec::new(), short: "7-x".to_owned() };
        let stat = Stat::read(&directory(pid)).unwrap().unwrap();
        assert!(places.is_named_rightly(&file, pid, &stat));
        let old = fs::File::options().write(true).open(&file).unwrap();
        old.set_modified(std::time::SystemTime::now() - Duration::from_secs(3600)).unwrap();
        assert!(!places.is_named_rightly(&file, pid, &stat), "it was started after the file was written");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
