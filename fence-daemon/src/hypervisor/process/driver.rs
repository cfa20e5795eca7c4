//! libvirt's drivers whose domains are processes of this host, and the files that they keep of
//! them.

use std::borrow::Cow;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use memchr::memmem;

/// Where libvirt's system daemons keep what they know about running domains.
const RUN: &str = "/run/libvirt";
/// Where they keep the definitions of domains.
const DEFINITIONS: &str = "/etc/libvirt";

/// A libvirt driver that runs domains as processes of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Driver {
    /// The system's QEMU driver.
    Qemu,
    /// The LXC driver.
    Lxc,
}

impl Driver {
    /// The driver behind a URI, if its domains are processes of this host. Only the system's own
    /// daemons on their own sockets count. Another socket may lead anywhere, and a user's session
    /// keeps its files where that user can write them.
    pub(crate) fn of(uri: &str) -> Option<Self> {
        match uri {
            "qemu:///system" | "qemu+unix:///system" => Some(Self::Qemu),
            "lxc:///" | "lxc:///system" | "lxc+unix:///" | "lxc+unix:///system" => Some(Self::Lxc),
            _ => None,
        }
    }

    /// The name of its folder, and of its control groups.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Lxc => "lxc",
        }
    }

    /// Whether libvirt keeps no file of any domain of this driver: neither a definition nor a
    /// record of one that runs. A folder that cannot be read is no proof.
    pub(crate) fn keeps_no_domain(self) -> bool {
        [DEFINITIONS, RUN].iter().all(|place| has_no_domain_file(&Path::new(place).join(self.name())))
    }

    fn run_file(self, name: &str, extension: &str) -> PathBuf {
        Path::new(RUN).join(self.name()).join(format!("{name}.{extension}"))
    }

    /// The file with the domain's process number. It is named by the domain's name as libvirt
    /// writes it in XML (`virPidFileBuildPath`); the status file is not.
    pub(super) fn pid_file(self, name: &str) -> PathBuf {
        self.run_file(&xml_escaped(name), "pid")
    }

    /// The process number in the domain's PID file.
    pub(super) fn pid_in_file(self, name: &str) -> Option<i32> {
        fs::read_to_string(self.pid_file(name)).ok()?.trim().parse().ok()
    }

    /// libvirt's own record of a running domain.
    fn status(self, name: &str) -> io::Result<Vec<u8>> {
        fs::read(self.run_file(name, "xml"))
    }

    /// The process number in libvirt's own record of a running domain.
    pub(super) fn recorded_pid(self, name: &str) -> Option<i32> {
        let status = self.status(name).ok()?;
        let state = StatusTags::of(&status)?.state;
        state.split_once("pid='")?.1.split_once('\'')?.0.parse().ok()
    }
}

/// The tags of interest in libvirt's status file. They come before the definition, which may hold
/// anything.
///
/// The file has tens of kilobytes, mostly names of QEMU's capabilities. It is read several times
/// before a kill, so the search is the fastest that there is.
struct StatusTags<'a> {
    /// The domain's state and process.
    state: Cow<'a, str>,
    /// What libvirt is doing with it, if it is written there.
    job: Option<Cow<'a, str>>,
}

impl<'a> StatusTags<'a> {
    fn of(status: &'a [u8]) -> Option<Self> {
        let (head, _) = halves(status, b"<domain ")?;
        Some(Self { state: tag(head, b"<domstatus ")?, job: tag(head, b"<job ") })
    }
}

/// The attributes of the first tag that begins like this.
fn tag<'a>(text: &'a [u8], start: &[u8]) -> Option<Cow<'a, str>> {
    let (_, rest) = halves(text, start)?;
    let end = memchr::memchr(b'>', rest).unwrap_or(rest.len());
    Some(String::from_utf8_lossy(&rest[..end]))
}

/// What comes before this text, and what comes after it.
fn halves<'a>(text: &'a [u8], between: &[u8]) -> Option<(&'a [u8], &'a [u8])> {
    let at = memmem::find(text, between)?;
    Some((&text[..at], &text[at + between.len()..]))
}

/// Whether a folder of libvirt's holds no domain's XML, or is not there.
fn has_no_domain_file(folder: &Path) -> bool {
    let is_xml = |entry: io::Result<fs::DirEntry>| {
        entry.map_or(true, |entry| entry.path().extension().is_some_and(|extension| extension == "xml"))
    };
    match fs::read_dir(folder) {
        Ok(entries) => !entries.into_iter().any(is_xml),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

fn xml_escaped(name: &str) -> String {
    // The ampersand first: the others bring new ones.
    let name = name.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    name.replace('"', "&quot;").replace('\'', "&apos;")
}

/// A job that libvirt may be doing with a domain, as far as it matters to a death.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Job {
    /// None, or one that leaves the domain where it is.
    None,
    /// The domain is on its way to another host, or was when libvirt lost sight of it. The death
    /// of this process may not be the domain's.
    Leaving,
    /// It is on its way here from another host: the death of this process is not the domain's.
    Arriving,
    /// It is going back to a snapshot, in another process; or libvirt's record cannot be read.
    Unknown,
}

impl Job {
    /// Reads libvirt's record of a domain. There is one while the domain runs, and until libvirt
    /// has noticed its end.
    pub(crate) fn on_record(driver: Driver, name: &str) -> Self {
        match driver {
            // The driver has no migration.
            Driver::Lxc => Self::None,
            Driver::Qemu => driver.status(name).map_or(Self::Unknown, |status| Self::of(&status)),
        }
    }

    /// Reads libvirt's status file.
    fn of(status: &[u8]) -> Self {
        let Some(StatusTags { state, job }) = StatusTags::of(status) else { return Self::Unknown };
        // Why it is paused outlives the job: a domain that has not come back here may run there.
        let paused = ["migration'", "post-copy"].map(|why| format!("state='paused' reason='{why}"));
        let here = if paused.iter().any(|paused| state.contains(paused)) { Self::Leaving } else { Self::None };
        let Some(job) = job else { return here };
        let kind = job.split_once("async='").and_then(|(_, rest)| rest.split_once('\'')).map(|(kind, _)| kind);
        match kind {
            Some("migration out") => Self::Leaving,
            // By post-copy it runs here, and whatever becomes of it, never there again.
            Some("migration in") if state.contains("state='running' reason='post-copy") => Self::None,
            Some("migration in") => Self::Arriving,
            // Not "save": the next start would resume the domain from the image. Not "snapshot": so
            // a newer libvirt (seen in 11.3) calls the way back to one as well.
            Some("none" | "dump" | "backup") => here,
            // Else it is going back to a snapshot, for which its process is replaced by another.
            Some("start") if state.contains("state='paused' reason='starting up'") => here,
            _ => Self::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_has_no_domains_where_libvirt_keeps_no_file_of_one() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().join("lxc");
        assert!(has_no_domain_file(&folder), "the driver is not installed");
        fs::create_dir_all(folder.join("networks")).unwrap();
        fs::write(folder.join("ct.pid"), b"7").unwrap();
        assert!(has_no_domain_file(&folder));
        fs::write(folder.join("ct.xml"), b"<domain/>").unwrap();
        assert!(!has_no_domain_file(&folder), "one is defined, or runs");
        assert!(!has_no_domain_file(&folder.join("ct.xml")), "what cannot be listed is no proof");
    }

    #[test]
    fn only_system_uris_have_local_processes() {
        assert_eq!(Driver::of("qemu:///system"), Some(Driver::Qemu));
        assert_eq!(Driver::of("lxc:///"), Some(Driver::Lxc));
        for uri in [
            "qemu+ssh://host/system",
            "qemu://host/system",
            "qemu:///session",
            "qemu:///system?socket=/tmp/x",
            "qemu+unix:///system?socket=/tmp/x",
            "test:///default",
            "xen:///system",
            "lxc://host/",
        ] {
            assert_eq!(Driver::of(uri), None, "{uri}");
        }
    }

    #[test]
    fn a_pid_files_name_is_the_domains_as_in_xml() {
        assert_eq!(xml_escaped("node 1 ü"), "node 1 ü");
        assert_eq!(xml_escaped("<a> & \"b's\""), "&lt;a&gt; &amp; &quot;b&apos;s&quot;");
    }

    #[test]
    fn libvirts_record_of_a_job_is_understood_or_doubted() {
        let status = |job: &str| {
            format!(
                "<domstatus state='running' reason='booted' pid='7'>\n  {job}\n  <domain type='qemu' id='1'>\n<job async='none'/>"
            )
        };
        for (job, meaning) in [
            ("<job type='none' async='none'/>", Job::None),
            ("<job type='none' async='backup' phase='none'>\n    <x/>\n  </job>", Job::None),
            ("<job type='none' async='migration out' phase='perform3' flags='0x3'/>", Job::Leaving),
            ("<job type='modify' async='migration in' phase='prepare'/>", Job::Arriving),
            ("<job type='none' async='snapshot' phase='none' flags='0x4'/>", Job::Unknown),
            ("<job type='none' async='something new'/>", Job::Unknown),
            ("<job type='none'/>", Job::Unknown),
            ("", Job::None),
        ] {
            assert_eq!(Job::of(status(job).as_bytes()), meaning, "{job}");
        }
        for (reason, meaning) in [
            ("user", Job::None),
            ("migration", Job::Leaving),
            ("post-copy", Job::Leaving),
            ("post-copy failed", Job::Leaving),
        ] {
            for job in ["", "<job type='none' async='none'/>"] {
                let status = status(job).replace("'running' reason='booted'", &format!("'paused' reason='{reason}'"));
                assert_eq!(Job::of(status.as_bytes()), meaning, "{status}");
            }
        }
        let arrived = status("<job type='none' async='migration in' phase='finish3'/>");
        for (reason, meaning) in
            [("migrated", Job::Arriving), ("post-copy", Job::None), ("post-copy failed", Job::None)]
        {
            assert_eq!(Job::of(arrived.replace("booted", reason).as_bytes()), meaning, "{reason}");
        }
        let starting = status("<job type='none' async='start'/>");
        assert_eq!(Job::of(starting.as_bytes()), Job::Unknown, "back to a snapshot");
        let starting = starting.replace("'running' reason='booted'", "'paused' reason='starting up'");
        assert_eq!(Job::of(starting.as_bytes()), Job::None);
        // Cut off in the middle, or something else altogether.
        for status in ["", "<domstatus state='running'>", "<domain type='qemu'>", "<jobs><domain "] {
            assert_eq!(Job::of(status.as_bytes()), Job::Unknown, "{status}");
        }
    }
}
