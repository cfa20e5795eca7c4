//! A disk image on a FUSE file system whose server answers when the test says so.
//!
//! While a request is held, its reader or writer is in uninterruptible sleep in the kernel, and not
//! even SIGKILL ends it. Lost storage looks like that to QEMU. The server runs in this process, and
//! the lab mounts the file system. When this process ends, the kernel fails all requests, and the
//! waiting processes can die.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Mutex;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use fence_common::sync::lock;
use fence_lab::board::Board;
use fence_lab::lab::Hypervisor;
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, Session,
    SessionACL, TimeOrNow, WriteFlags,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::turns::Turn;

/// The image's name in the file system.
const IMAGE: &str = "disk";
/// The image's number in it; the directory is 1.
const INODE: INodeNo = INodeNo(2);
/// How long the kernel may cache attributes.
const TTL: Duration = Duration::from_secs(1);
/// How often a request is looked for that no thread waits for.
const ATTEMPTS: u32 = 50;
/// How long a thread may take from its request to its sleep.
const SETTLED: Duration = Duration::from_millis(100);
/// How long a guest may take until it uses its disk, on a loaded machine.
const USE_LIMIT: Duration = Duration::from_secs(60);

/// An answer that is held back.
enum Held {
    Read(u64, usize, ReplyData),
    Write(u64, Vec<u8>, ReplyWrite),
    Close(ReplyEmpty),
}

#[derive(Default)]
struct FuseState {
    image: Vec<u8>,
    holds: bool,
    /// Whether only writes are held.
    reads_pass: bool,
    /// Whether closes of the image are held.
    holds_closes: bool,
    /// Whether writes fail for want of room.
    full: bool,
    held: Vec<Held>,
    /// Writes that were carried out.
    written: u64,
}

impl FuseState {
    /// Answers now, or when the requests are released.
    fn take(&mut self, request: Held) {
        let is_held = match &request {
            Held::Read(..) => self.holds && !self.reads_pass,
            Held::Write(..) => self.holds,
            Held::Close(_) => self.holds_closes,
        };
        if is_held {
            self.held.push(request);
        } else {
            self.answer(request);
        }
    }

    fn answer(&mut self, held: Held) {
        match held {
            Held::Read(offset, size, reply) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX).min(self.image.len());
                let to = from.saturating_add(size).min(self.image.len());
                reply.data(&self.image[from..to]);
            }
            Held::Close(reply) => reply.ok(),
            Held::Write(_, _, reply) if self.full => reply.error(Errno::ENOSPC),
            Held::Write(offset, data, reply) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX);
                match from.checked_add(data.len()).and_then(|to| self.image.get_mut(from..to)) {
                    Some(place) => {
                        place.copy_from_slice(&data);
                        self.written += 1;
                        reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX));
                    }
                    None => reply.error(Errno::ENOSPC),
                }
            }
        }
    }
}

/// What server and test share.
type Shared = Board<FuseState>;

/// The server.
struct FuseServer(Shared);

impl FuseServer {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let size = self.0.lock().image.len() as u64;
        let (kind, perm, nlink, size) =
            if inode == INODE { (FileType::RegularFile, 0o600, 1, size) } else { (FileType::Directory, 0o755, 2, 0) };
        FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for FuseServer {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Requests under way without a thread that waits for them, as on real storage.
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        Ok(())
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == IMAGE {
            reply.entry(&TTL, &self.attributes(INODE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(inode));
    }

    // What libvirt sets (owner, mode) has no meaning here.
    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.attr(&TTL, &self.attributes(inode));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Past the page cache: each access is a request.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.0.change(|state| state.take(Held::Read(offset, usize::try_from(size).unwrap_or(usize::MAX), reply)));
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.0.change(|state| state.take(Held::Write(offset, data.to_vec(), reply)));
    }

    // What the kernel asks at each close, and at the end of a process that has the image open.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        self.0.change(|state| state.take(Held::Close(reply)));
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }
}

/// A served image. Dropping it fails the held requests and unmounts it.
pub(super) struct Disk {
    hypervisor: Hypervisor,
    directory: String,
    shared: Shared,
    server: Option<JoinHandle<()>>,
    /// From the first write that no thread waits for.
    turn: Mutex<Option<Turn>>,
}

impl Disk {
    /// Mounts a file system with an image of this content in the lab.
    pub(super) fn serve(hypervisor: &Hypervisor, name: &str, image: Vec<u8>) -> Result<Self> {
        let directory = hypervisor.path(&format!("{name}.fuse"));
        std::fs::create_dir_all(hypervisor.outside(&directory))?;
        let device = File::options().read(true).write(true).open("/dev/fuse").context("/dev/fuse: modprobe fuse")?;
        let options =
            format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions", device.as_raw_fd());
        hypervisor.space().in_mounts(|| {
            mount(Some("lab"), directory.as_str(), Some("fuse"), MsFlags::MS_NODEV, Some(options.as_str()))
                .context("mounting FUSE")
        })?;
        let shared = Shared::default();
        shared.lock().image = image;
        let mut disk = Self {
            hypervisor: hypervisor.clone(),
            directory,
            shared: shared.clone(),
            server: None,
            turn: Mutex::default(),
        };
        let session =
            Session::from_fd(FuseServer(shared), OwnedFd::from(device), SessionACL::All, fuser::Config::default())?;
        disk.server = Some(std::thread::spawn(move || {
            // The session ends with the mount. An error has no reader then.
            let _ = session.run();
        }));
        Ok(disk)
    }

    /// The image's path in the lab.
    #[must_use]
    pub(super) fn path(&self) -> String {
        format!("{}/{IMAGE}", self.directory)
    }

    /// Holds all requests from now on. Returns when one is held.
    pub(super) fn hold(&self) -> Result<()> {
        self.hold_all_but_reads(false)
    }

    /// Like [`Self::hold`], with no thread of this process waiting for the answer: the request is
    /// the kernel's alone. QEMU with `io_uring` leaves unaligned requests to threads (a write to a
    /// file here is one), and cannot die then.
    pub(super) fn hold_in_flight(&self, pid: u32) -> Result<()> {
        self.hold_without_thread(pid, false)
    }

    /// As [`Self::hold_in_flight`], for writes alone.
    pub(super) fn hold_writes_in_flight(&self, pid: u32) -> Result<()> {
        self.hold_without_thread(pid, true)
    }

    fn hold_without_thread(&self, pid: u32, reads_pass: bool) -> Result<()> {
        lock(&self.turn).get_or_insert_with(Turn::to_leave_writes);
        for _ in 0..ATTEMPTS {
            self.hold_all_but_reads(reads_pass)?;
            // A thread has sent its request a moment before it sleeps.
            std::thread::sleep(SETTLED);
            if !has_waiting_thread(pid)? {
                return Ok(());
            }
            self.release();
            self.wait_written()?;
        }
        bail!("each of {ATTEMPTS} requests to {} is a thread's", self.path())
    }

    /// From now on each close of the image waits. A killed process has no memory any more by then,
    /// and is not dead before it is answered.
    pub(super) fn hold_closes(&self) {
        self.shared.lock().holds_closes = true;
    }

    fn hold_all_but_reads(&self, reads_pass: bool) -> Result<()> {
        self.shared.change(|state| (state.holds, state.reads_pass) = (true, reads_pass));
        let is_held = self.shared.wait(USE_LIMIT, |state| (!state.held.is_empty()).then_some(()));
        is_held.with_context(|| format!("nobody uses {} within {USE_LIMIT:?}", self.path()))
    }

    /// Carries out and answers what was held, and all that comes.
    pub(super) fn release(&self) {
        let mut state = self.shared.lock();
        (state.holds, state.holds_closes) = (false, false);
        for held in std::mem::take(&mut state.held) {
            state.answer(held);
        }
    }

    /// Writes fail from now on, as on a full file system. QEMU then stops the machine.
    pub(super) fn fill(&self) {
        self.shared.lock().full = true;
    }

    /// There is room again.
    pub(super) fn make_room(&self) {
        self.shared.lock().full = false;
    }

    /// How many writes have come to the image.
    #[must_use]
    pub(super) fn written(&self) -> u64 {
        self.shared.lock().written
    }

    /// Waits until the machine has written once more.
    pub(super) fn wait_written(&self) -> Result<()> {
        let before = self.written();
        let is_written = self.shared.wait(USE_LIMIT, |state| (state.written != before).then_some(()));
        is_written.with_context(|| format!("nobody writes to {} within {USE_LIMIT:?}", self.path()))
    }
}

/// Whether a thread of a process waits for the image, or may be about to: one of io_uring's that
/// has not had a processor since.
fn has_waiting_thread(pid: u32) -> Result<bool> {
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = thread?.path();
        let read = |name: &str| std::fs::read_to_string(thread.join(name)).unwrap_or_default();
        let stat = read("stat");
        // The name may hold anything, so it is cut off from behind.
        let Some((name, rest)) = stat.rsplit_once(") ") else { continue };
        let is_worker = name.contains("(iou-wrk-");
        if rest.starts_with('D') || (is_worker && (rest.starts_with('R') || read("stack").contains("fuse_"))) {
            return Ok(true);
        }
    }
    Ok(false)
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Forced: the kernel then fails all that is under way, and the server's next read.
        let directory = self.directory.clone();
        let unmounted = self.hypervisor.space().in_mounts(|| {
            umount2(directory.as_str(), MntFlags::MNT_FORCE)
                .or_else(|_| umount2(directory.as_str(), MntFlags::MNT_DETACH))?;
            Ok(())
        });
        // Answers to requests that are over go nowhere.
        self.release();
        if let (Ok(()), Some(server)) = (unmounted, self.server.take()) {
            let _ = server.join();
        }
    }
}
