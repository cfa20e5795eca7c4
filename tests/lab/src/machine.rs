//! Small QEMU machines of a lab's libvirtd: firmware, and optionally a disk with a boot sector of
//! our own.

use std::fmt::Write as _;

use anyhow::Result;

use crate::libvirtd::Libvirtd;
use crate::qemu::{URI, emulator};
use crate::tools;

/// The first disk's size: the boot sector and one more that it writes to.
const DISK_SIZE: usize = 1 << 20;

/// A machine of 16 MiB without KVM. With firmware alone it runs and does nothing.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    name: String,
    uuid: Option<String>,
    devices: String,
    /// A file that is loaded into its memory.
    filling: Option<String>,
    /// What libvirt does when it panics, if not `destroy`.
    on_crash: Option<&'static str>,
    /// Whether other processes get at its memory.
    shared: bool,
    /// How much memory it uses from the start, in MiB.
    touched: Option<u32>,
    /// A file that is mapped into its process.
    mapped: Option<String>,
}

/// How much of a machine's memory a file can fill.
pub const FILLING: usize = 48 << 20;

/// The size of a file that a machine can have a mapping of.
pub const MAPPED: usize = DISK_SIZE;

impl Machine {
    /// A machine with firmware alone.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    /// With this UUID instead of one that libvirt chooses.
    #[must_use]
    pub fn uuid(mut self, uuid: &str) -> Self {
        self.uuid = Some(uuid.to_owned());
        self
    }

    /// Adds a raw disk at this path in the lab, past the host's page cache. `io` is `threads`,
    /// `native` or `io_uring`.
    #[must_use]
    pub fn disk(mut self, path: &str, io: &str) -> Self {
        self.devices += &disk("file", "file", path, io);
        self
    }

    /// The same with a block device.
    #[must_use]
    pub fn block_disk(mut self, path: &str, io: &str) -> Self {
        self.devices += &disk("block", "dev", path, io);
        self
    }

    /// With this device, in libvirt's words.
    #[must_use]
    pub fn device(mut self, xml: &str) -> Self {
        self.devices.push_str(xml);
        self
    }

    /// With a serial port whose output goes to a file in the lab.
    #[must_use]
    pub fn serial(mut self, path: &str) -> Self {
        let _ = write!(self.devices, "<serial type='file'><source path='{path}'/><target port='0'/></serial>");
        self
    }

    /// Adds a device that reports a panic (see [`panicking_disk`]). The machine then stays as it
    /// is.
    #[must_use]
    pub fn kept_after_panic(mut self) -> Self {
        self.devices.push_str("<panic model='isa'/>");
        self.on_crash = Some("preserve");
        self
    }

    /// Adds memory, most of it filled from this file of [`FILLING`] bytes, so that a migration has
    /// data to copy.
    #[must_use]
    pub fn filled(mut self, path: &str) -> Self {
        self.filling = Some(path.to_owned());
        self
    }

    /// Sets the memory in MiB. QEMU takes all of it at the start, as if the machine had used every
    /// page.
    #[must_use]
    pub fn touched(mut self, mebibytes: u32) -> Self {
        self.touched = Some(mebibytes);
        self
    }

    /// With memory that vhost-user servers (virtiofsd) can get at.
    #[must_use]
    pub fn shared_memory(mut self) -> Self {
        self.shared = true;
        self
    }

    /// With a mapping of this file of [`MAPPED`] bytes in its process. The machine does not use it.
    #[must_use]
    pub fn mapping(mut self, path: &str) -> Self {
        self.mapped = Some(path.to_owned());
        self
    }

    /// The definition.
    pub fn xml(&self) -> Result<String> {
        let Self { name, uuid, devices, filling, on_crash, shared, touched, mapped } = self;
        let on_crash = on_crash.unwrap_or("destroy");
        let emulator = emulator()?;
        let uuid = uuid.as_ref().map(|uuid| format!("<uuid>{uuid}</uuid>")).unwrap_or_default();
        let memory = touched.unwrap_or(if filling.is_some() { 64 } else { 16 });
        let filling = filling.as_ref().map(|file| {
            format!("<qemu:arg value='-device'/><qemu:arg value='loader,file={file},addr=0x800000,force-raw=on'/>")
        });
        let mapped = mapped.as_ref().map(|file| {
            format!(
                "<qemu:arg value='-object'/>\
                 <qemu:arg value='memory-backend-file,id=mapped,size={MAPPED},mem-path={file},share=off'/>"
            )
        });
        let arguments: String = filling.into_iter().chain(mapped).collect();
        let arguments = match arguments.as_str() {
            "" => String::new(),
            some => format!("<qemu:commandline>{some}</qemu:commandline>"),
        };
        let backing = match (shared, touched) {
            (true, _) => {
                "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking><features><acpi/></features>"
            }
            (false, Some(_)) => "<memoryBacking><allocation mode='immediate'/></memoryBacking>",
            (false, None) => "",
        };
        Ok(format!(
            "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>{name}</name>{uuid}\
             <memory unit='MiB'>{memory}</memory>{backing}<vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='pc'>hvm</type></os><on_crash>{on_crash}</on_crash>\
             <devices><emulator>{emulator}</emulator><controller type='usb' model='none'/>\
             <memballoon model='none'/>{devices}</devices>{arguments}</domain>"
        ))
    }

    /// Defines it.
    pub fn define(&self, libvirtd: &Libvirtd) -> Result<()> {
        libvirtd.define(URI, &self.name, &self.xml()?)
    }

    /// Defines it and starts it.
    pub fn start(&self, libvirtd: &Libvirtd) -> Result<()> {
        self.define(libvirtd)?;
        libvirtd.start_domain(URI, &self.name)
    }

    /// Starts it without a definition that outlives it.
    pub fn create_transient(&self, libvirtd: &Libvirtd) -> Result<()> {
        tools::require(&["virsh"])?;
        let file = libvirtd.hypervisor().write(&format!("{}.xml", self.name), self.xml()?.as_bytes())?;
        libvirtd.virsh(URI, &["create", &file]).map(drop)
    }
}

fn disk(kind: &str, source: &str, path: &str, io: &str) -> String {
    format!(
        "<disk type='{kind}' device='disk'><driver name='qemu' type='raw' cache='none' io='{io}'/>\
         <source {source}='{path}'/><target dev='hda' bus='ide'/></disk>"
    )
}

/// What a machine's serial port says once for each boot of [`writing_disk`].
pub const BOOTED: u8 = b'B';

/// A disk whose boot sector prints [`BOOTED`] on the serial port, and then writes the next sector
/// about ten times a second.
#[must_use]
pub fn writing_disk() -> Vec<u8> {
    #[rustfmt::skip]
    const PROGRAM: [u8; 46] = [
        0xfa,                         // cli
        0x31, 0xc0,                   // xor ax, ax
        0x8e, 0xd8,                   // mov ds, ax
        0x8e, 0xd0,                   // mov ss, ax
        0xbc, 0x00, 0x7c,             // mov sp, 0x7c00
        0xfb,                         // sti
        0xba, 0xf8, 0x03,             // mov dx, 0x3f8 (the first serial port)
        0xb0, BOOTED,                 // mov al, BOOTED
        0xee,                         // out dx, al
        // again:
        0xb8, 0x00, 0x43,             // mov ax, 0x4300 (write sectors by their number)
        0xb2, 0x80,                   // mov dl, 0x80 (the first disk)
        0xbe, 0x1e, 0x7c,             // mov si, where
        0xcd, 0x13,                   // int 0x13
        0xf4,                         // hlt, until the timer's next tick
        0xeb, 0xf3,                   // jmp again
        // where:
        0x10, 0x00, 0x01, 0x00,       // 16 bytes, one sector ...
        0x00, 0x7e, 0x00, 0x00,       // ... from 0000:7e00 ...
        0x01, 0, 0, 0, 0, 0, 0, 0,    // ... to number 1
    ];
    bootable(&PROGRAM)
}

/// A disk whose boot sector says that the machine has panicked.
#[must_use]
pub fn panicking_disk() -> Vec<u8> {
    #[rustfmt::skip]
    const PROGRAM: [u8; 10] = [
        0xba, 0x05, 0x05,             // mov dx, 0x505 (the panic device)
        0xb0, 0x01,                   // mov al, 1 (panicked)
        0xee,                         // out dx, al
        0xfa,                         // cli
        0xf4,                         // hlt
        0xeb, 0xfd,                   // jmp to the hlt
    ];
    bootable(&PROGRAM)
}

/// A disk with this program in its boot sector.
fn bootable(program: &[u8]) -> Vec<u8> {
    let mut image = vec![0; DISK_SIZE];
    image[..program.len()].copy_from_slice(program);
    image[510..512].copy_from_slice(&[0x55, 0xaa]);
    image
}
