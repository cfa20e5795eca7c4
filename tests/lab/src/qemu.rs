//! QEMU machines of a lab's libvirtd, without KVM: a Linux guest that runs commands for a test, and
//! an idle machine.

use std::io::{ErrorKind, Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use data_encoding::BASE64;

use crate::client::Client;
use crate::debian::{Kernel, Series};
use crate::initramfs::{self, System};
use crate::lab::{BRIDGE, Hypervisor};
use crate::libvirtd::Libvirtd;
use crate::machine::Machine;
use crate::process::Finished;
use crate::tools;

/// libvirt's driver for these machines.
pub const URI: &str = "qemu:///system";
/// The time limit of a guest's boot under TCG on a loaded machine. An idle one takes 2 to 4 s.
pub const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// The emulator's path.
pub fn emulator() -> Result<String> {
    Ok(tools::find("qemu-system-x86_64")?.to_string_lossy().into_owned())
}

/// Defines and starts a machine with firmware only, 16 MiB: it runs, and does nothing.
pub fn start_idle(libvirtd: &Libvirtd, name: &str) -> Result<()> {
    Machine::new(name).start(libvirtd)
}

/// What [`start_idle`] would start.
pub fn define_idle(libvirtd: &Libvirtd, name: &str) -> Result<()> {
    Machine::new(name).define(libvirtd)
}

/// A machine that boots Linux. Its first serial port is a log file, another one is a socket for
/// commands.
#[derive(Clone, Copy, Debug)]
pub struct Linux<'a> {
    /// Its name for libvirt.
    pub name: &'a str,
    /// Its memory.
    pub mebibytes: u32,
    /// What it boots.
    pub kernel: &'a Kernel,
    /// The first file system.
    pub initrd: &'a [u8],
    /// The end of its Ethernet address, which no other machine of the lab has.
    pub address: [u8; 2],
    /// More devices, in libvirt's words.
    pub devices: &'a str,
    /// More arguments of QEMU.
    pub arguments: &'a [&'a str],
    /// The number of the serial port for commands: 1 is `/dev/ttyS1`.
    pub console: u8,
}

impl Linux<'_> {
    /// Defines the machine.
    pub fn define(&self, libvirtd: &Libvirtd) -> Result<()> {
        let Self { name, mebibytes, kernel, initrd, address: [high, low], devices, arguments, console: port } = self;
        let hypervisor = libvirtd.hypervisor();
        let initrd = hypervisor.write(&format!("{name}.initrd"), initrd)?;
        let (kernel, emulator) = (kernel.image.display(), emulator()?);
        let (log, console) = (console_log(hypervisor, name), console_socket(hypervisor, name));
        let arguments: String = arguments.iter().map(|argument| format!("<qemu:arg value='{argument}'/>")).collect();
        let xml = format!(
            "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>{name}</name><memory unit='MiB'>{mebibytes}</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='pc'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>\
             <cmdline>console=ttyS0 panic=-1 mitigations=off tsc=unstable quiet</cmdline></os>\
             <devices><emulator>{emulator}</emulator><controller type='usb' model='none'/><memballoon model='none'/>\
             <interface type='bridge'><source bridge='{BRIDGE}'/><mac address='52:54:00:00:{high:02x}:{low:02x}'/>\
             <model type='virtio'/><rom enabled='no'/></interface>\
             <serial type='file'><source path='{log}'/><target port='0'/></serial>\
             <serial type='unix'><source mode='bind' path='{console}'/><target port='{port}'/></serial>{devices}</devices>\
             <qemu:commandline>{arguments}</qemu:commandline></domain>"
        );
        libvirtd.define(URI, name, &xml)
    }
}

/// What a guest has beside its network card and its console.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extras<'a> {
    /// More devices, in libvirt's words.
    pub devices: &'a str,
    /// More arguments of QEMU.
    pub arguments: &'a [&'a str],
    /// More in its system.
    pub system: initramfs::SystemExtras<'a>,
    /// Whether its second serial port, `/dev/ttyS1`, is one of `devices`. Its commands come by the
    /// third one then.
    pub second_port: bool,
}

/// A Linux guest with the stock client.
#[derive(Debug)]
pub struct LinuxGuest {
    hypervisor: Hypervisor,
    name: String,
    console: UnixStream,
    /// What was read and is no whole line yet.
    unread: Vec<u8>,
    last_number: u32,
}

impl LinuxGuest {
    /// Defines a guest 192.168.122.(20+`number`), starts it and waits until it runs commands. The
    /// error of a failed boot has its console.
    pub fn boot(libvirtd: &Libvirtd, name: &str, number: u8, key: &[u8]) -> Result<Self> {
        Self::boot_with(libvirtd, name, number, key, &Extras::default())
    }

    /// Like [`Self::boot`], and the guest has a third serial port, `/dev/ttyS2`. This is its socket
    /// on the hypervisor.
    pub fn boot_with_line(libvirtd: &Libvirtd, name: &str, number: u8, key: &[u8], socket: &str) -> Result<Self> {
        let port = format!("<serial type='unix'><source mode='bind' path='{socket}'/><target port='2'/></serial>");
        Self::boot_with(libvirtd, name, number, key, &Extras { devices: &port, ..Extras::default() })
    }

    /// Like [`Self::boot`], with more.
    pub fn boot_with(libvirtd: &Libvirtd, name: &str, number: u8, key: &[u8], extras: &Extras<'_>) -> Result<Self> {
        let Extras { devices, arguments, system, second_port } = *extras;
        let hypervisor = libvirtd.hypervisor();
        let kernel = Kernel::get(Series::Linux6_1)?;
        let address = Ipv4Addr::new(192, 168, 122, number.saturating_add(20));
        let console = if second_port { 2 } else { 1 };
        let initrd = initramfs::build(&kernel, &System { address, key, console, extras: system })?;
        let (initrd, address) = (&initrd, [0, number]);
        Linux { name, mebibytes: 192, kernel: &kernel, initrd, address, devices, arguments, console }
            .define(libvirtd)?;
        libvirtd.start_domain(URI, name)?;
        Self::connect(hypervisor, name)
    }

    /// Connects to the console of a started guest and waits until it runs commands. The error of a
    /// failed boot has its console.
    pub fn connect(hypervisor: &Hypervisor, name: &str) -> Result<Self> {
        Self::open(hypervisor, name)?.wait_up()
    }

    /// Connects to the console of a guest that may not run commands yet.
    pub fn open(hypervisor: &Hypervisor, name: &str) -> Result<Self> {
        let path = hypervisor.outside(&console_socket(hypervisor, name));
        let console = UnixStream::connect(&path).with_context(|| format!("{name}'s console {}", path.display()))?;
        console.set_read_timeout(Some(Duration::from_millis(200)))?;
        let (hypervisor, name) = (hypervisor.clone(), name.to_owned());
        Ok(Self { hypervisor, name, console, unread: Vec::new(), last_number: 0 })
    }

    /// Waits until it runs commands.
    ///
    /// # Errors
    /// It does not boot; the error has its console.
    pub fn wait_up(mut self) -> Result<Self> {
        let deadline = Instant::now() + BOOT_LIMIT;
        // The guest may lose what it gets before it listens. So ask until it answers any question,
        // at growing intervals.
        let mut pause = Duration::from_secs(1);
        while !self.answers(pause)? {
            pause = (pause * 3 / 2).min(Duration::from_secs(5));
            if Instant::now() > deadline {
                let log = self.hypervisor.outside(&console_log(&self.hypervisor, &self.name));
                let log = std::fs::read_to_string(log).unwrap_or_default();
                bail!("{} does not boot within {BOOT_LIMIT:?}; its console: {log}", self.name);
            }
        }
        Ok(self)
    }

    /// Whether it answers anything within this time.
    fn answers(&mut self, limit: Duration) -> Result<bool> {
        self.last_number += 1;
        writeln!(self.console, "{} true", self.last_number).with_context(|| format!("{}'s console", self.name))?;
        let deadline = Instant::now() + limit;
        while let Some(line) = self.read_line(deadline.saturating_duration_since(Instant::now()))? {
            if parse_answer(&line, Duration::ZERO).is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Runs a command line in the guest.
    ///
    /// # Errors
    /// No answer within `limit`.
    pub fn command(&mut self, line: &str, limit: Duration) -> Result<Finished> {
        self.last_number += 1;
        let number = self.last_number;
        let started = Instant::now();
        writeln!(self.console, "{number} {line}").with_context(|| format!("{}'s console", self.name))?;
        while let Some(left) = limit.checked_sub(started.elapsed()) {
            let Some(answer) = self.read_line(left)? else { break };
            if let Some((answered, finished)) = parse_answer(&answer, started.elapsed())
                && answered == number
            {
                return Ok(finished);
            }
        }
        bail!("{}: no answer to `{line}` within {limit:?}", self.name)
    }

    /// Runs the stock client in the guest, with the guest's own key file.
    pub fn fence(&mut self, client: &Client) -> Result<Finished> {
        self.command(&format!("{} {}", client.program(), client.arguments().join(" ")), Duration::from_secs(60))
    }

    /// The next line from the console, if one comes in time.
    fn read_line(&mut self, limit: Duration) -> Result<Option<String>> {
        let deadline = Instant::now() + limit;
        let mut buffer = [0; 4096];
        loop {
            if let Some(end) = self.unread.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                return Ok(Some(String::from_utf8_lossy(&line).trim_end().to_owned()));
            }
            if Instant::now() > deadline {
                return Ok(None);
            }
            match self.console.read(&mut buffer) {
                Ok(0) => bail!("{}'s console closed", self.name),
                Ok(count) => self.unread.extend_from_slice(&buffer[..count]),
                // A read with a time limit does not resume by itself after a stop of the process.
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {
                }
                Err(error) => return Err(error).with_context(|| format!("{}'s console", self.name)),
            }
        }
    }
}

fn console_socket(hypervisor: &Hypervisor, name: &str) -> String {
    hypervisor.path(&format!("{name}.console"))
}

fn console_log(hypervisor: &Hypervisor, name: &str) -> String {
    hypervisor.path(&format!("{name}.log"))
}

/// Reads "lab NUMBER CODE STDOUT STDERR" (see `initramfs`); `None` if the line is no such answer.
fn parse_answer(line: &str, elapsed: Duration) -> Option<(u32, Finished)> {
    let mut words = line.split_whitespace();
    if words.next()? != "lab" {
        return None;
    }
    let number = words.next()?.parse().ok()?;
    let code = Some(words.next()?.parse().ok()?);
    let (stdout, stderr) = (base64(words.next()?)?, base64(words.next()?)?);
    Some((number, Finished { code, stdout, stderr, elapsed }))
}

/// Decodes base64; `-` is nothing.
fn base64(text: &str) -> Option<String> {
    let bytes = if text == "-" { Vec::new() } else { BASE64.decode(text.as_bytes()).ok()? };
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read() {
        let (number, finished) = parse_answer("lab 7 2 aGVsbG8K -", Duration::ZERO).unwrap();
        assert_eq!((number, finished.code), (7, Some(2)));
        assert_eq!((finished.stdout.as_str(), finished.stderr.as_str()), ("hello\n", ""));
        assert!(parse_answer("[    1.0] lab equipment", Duration::ZERO).is_none());
        assert_eq!(base64("aGk=").as_deref(), Some("hi"));
        assert_eq!(base64("a*").as_deref(), None);
    }
}
