//! The little of libvirt that the `virt` crate does not wrap: the process-wide set-up and the close callback.
//!
//! The only `unsafe` of the hypervisor module lives here.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use virt::connect::Connect;
use virt::error::Error;

/// What is called when libvirt finds a connection dead.
type Notice = Box<dyn FnOnce() + Send>;

/// The notices of the open connections, by the number that libvirt hands back as the callback's opaque value.
///
/// A number and not a pointer: libvirt drivers differ in when, and whether, they free a callback's data. A number needs no owner,
/// so that a callback that comes late finds nothing instead of freed memory.
static NOTICES: OnceLock<Mutex<HashMap<usize, Notice>>> = OnceLock::new();

/// The next number to give out.
static NEXT: AtomicUsize = AtomicUsize::new(1);

/// Prepares libvirt once for the whole process, before the first connection: its errors go to us and not to stderr, and its event
/// loop runs, without which neither keepalive nor close callbacks work. Call on a thread that may block.
pub(super) fn prepare() -> Result<(), Error> {
    static PREPARED: OnceLock<Result<(), Error>> = OnceLock::new();
    PREPARED
        .get_or_init(|| {
            virt::error::clear_error_callback();
            virt::event::event_register_default_impl()?;
            // A process that cannot start this thread still serves requests; only dead connections are noticed later.
            if let Err(error) = thread::Builder::new().name("libvirt-events".to_owned()).spawn(run_events) {
                tracing::error!(%error, "no thread for libvirt's event loop: dead connections will be noticed late");
            }
            Ok(())
        })
        .clone()
}

/// libvirt's event loop, for the life of the process.
fn run_events() {
    loop {
        if let Err(error) = virt::event::event_run_default_impl() {
            tracing::warn!(error = error.message(), "libvirt's event loop stumbled");
            thread::sleep(Duration::from_secs(1));
        }
    }
}

/// A registered close callback. It must be ended before its connection is closed: libvirt's registration holds the connection.
pub(super) struct CloseWatch {
    number: usize,
    /// The very pointer that was registered: libvirt compares it, and Rust does not promise that a function has one address.
    callback: virt_sys::virConnectCloseFunc,
}

impl CloseWatch {
    /// Has `notice` called, on libvirt's event thread, when `connect` turns out dead. It must neither block nor call libvirt.
    ///
    /// Drivers in our own process, which cannot lose a connection, accept it and never call.
    pub(super) fn begin(connect: &Connect, notice: Notice) -> Result<Self, Error> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        notices().insert(number, notice);
        let callback: virt_sys::virConnectCloseFunc = Some(on_close);
        let opaque = std::ptr::without_provenance_mut::<c_void>(number);
        // SAFETY: needed because `virt` does not wrap the call. `connect` is open (it is borrowed, and only `close` takes it), the
        // callback has the C signature and lives as long as the program, and `opaque` is a plain number that is never dereferenced,
        // so nothing has to be freed: hence no free function.
        let status = unsafe { virt_sys::virConnectRegisterCloseCallback(connect.as_ptr(), callback, opaque, None) };
        if status != 0 {
            // Fetched first: what follows must not disturb this thread's last error.
            let error = Error::last_error();
            notices().remove(&number);
            return Err(error);
        }
        Ok(Self { number, callback })
    }

    /// Ends the registration on the connection that it was begun on.
    pub(super) fn end(self, connect: &Connect) {
        if notices().remove(&self.number).is_none() {
            // It was called, which ended the registration.
            return;
        }
        // SAFETY: needed because `virt` does not wrap the call. `connect` is open (as above) and the pointer is the registered one. A
        // driver without close callbacks returns an error, which is no matter.
        let status = unsafe { virt_sys::virConnectUnregisterCloseCallback(connect.as_ptr(), self.callback) };
        if status != 0 {
            tracing::debug!(error = Error::last_error().message(), "close callback not unregistered");
        }
    }
}

/// The notices, whatever happened to a thread that held them: a map of callbacks is whole between any two of its operations.
fn notices() -> MutexGuard<'static, HashMap<usize, Notice>> {
    NOTICES.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

/// Called by libvirt with the number given at registration.
extern "C" fn on_close(_connect: virt_sys::virConnectPtr, _reason: c_int, opaque: *mut c_void) {
    // Taken out first: a notice is given once, and not with the lock held.
    let notice = notices().remove(&opaque.addr());
    if let Some(notice) = notice {
        notice();
    }
}
