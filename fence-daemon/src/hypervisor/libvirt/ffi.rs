//! The little of libvirt that the `virt` crate does not wrap, or not soundly: the process-wide set-up, the close callback, domain events
//! and jobs.
//!
//! The only `unsafe` of the hypervisor module lives here.

use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;

/// What is called when libvirt finds a connection dead.
type Notice = Box<dyn FnOnce() + Send>;

/// The notices of the open connections, by the number that libvirt hands back as the callback's opaque value.
///
/// A number and not a pointer: libvirt drivers differ in when, and whether, they free a callback's data. A number needs no owner,
/// so that a callback that comes late finds nothing instead of freed memory.
static NOTICES: OnceLock<Mutex<HashMap<usize, Notice>>> = OnceLock::new();

/// What libvirt tells about a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// It was started, stopped, defined, undefined, renamed, suspended, resumed or moved, or a device came or went.
    Changed(Uuid),
    /// It was reset.
    Reset(Uuid),
    /// It was stopped because it is on its way to another host, where it may go on from now on.
    Leaving(Uuid),
}

/// What is called when something happens to a domain.
type Listener = Arc<dyn Fn(News) + Send + Sync>;

/// The listeners of the open connections, by number for the same reason.
static LISTENERS: OnceLock<Mutex<HashMap<usize, Listener>>> = OnceLock::new();

/// The next number to give out.
static NEXT: AtomicUsize = AtomicUsize::new(1);

/// Prepares libvirt once for the whole process, before the first connection: its errors go to us and not to stderr, and its event
/// loop runs, without which neither keepalive nor close callbacks work. Call on a thread that may block.
pub(crate) fn prepare() -> Result<(), Error> {
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
pub(crate) struct CloseWatch {
    number: usize,
    /// The very pointer that was registered: libvirt compares it, and Rust does not promise that a function has one address.
    callback: virt_sys::virConnectCloseFunc,
}

impl CloseWatch {
    /// Has `notice` called, on libvirt's event thread, when `connect` turns out dead. It must neither block nor call libvirt.
    ///
    /// Drivers in our own process, which cannot lose a connection, accept it and never call.
    pub(crate) fn begin(connect: &Connect, notice: Notice) -> Result<Self, Error> {
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
    pub(crate) fn end(self, connect: &Connect) {
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

/// A registration for what happens to domains. It must be ended before its connection is closed, for the same reason.
pub(crate) struct EventWatch {
    number: usize,
    /// libvirt's numbers of the registrations.
    ids: Vec<c_int>,
    tells_resets: bool,
}

impl EventWatch {
    /// Has `listener` called, on libvirt's event thread, with what happens to domains. It must neither block nor call libvirt.
    ///
    /// # Errors
    /// The driver has no events. That it tells nothing of resets or devices is none.
    pub(crate) fn begin(connect: &Connect, listener: Listener) -> Result<Self, Error> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        listeners().insert(number, listener);
        // SAFETY: needed because libvirt takes callbacks of all kinds of events as the one type of the simplest, and C casts them.
        // Sound because libvirt calls a callback of VIR_DOMAIN_EVENT_ID_LIFECYCLE with exactly the arguments of `on_lifecycle`
        // (virConnectDomainEventCallback), and with no others; the pointer is only ever called by libvirt.
        let on_lifecycle = unsafe {
            std::mem::transmute::<LifecycleCallback, virt_sys::virConnectDomainEventGenericCallback>(Some(on_lifecycle))
        };
        // SAFETY: needed as above. Sound because libvirt calls a callback of VIR_DOMAIN_EVENT_ID_DEVICE_ADDED and of _REMOVED with exactly the
        // arguments of `on_device` (virConnectDomainEventDeviceAddedCallback and its twin), and with no others.
        let on_device = unsafe {
            std::mem::transmute::<DeviceCallback, virt_sys::virConnectDomainEventGenericCallback>(Some(on_device))
        };
        let mut watch = Self { number, ids: Vec::new(), tells_resets: false };
        match register(connect, virt_sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, on_lifecycle, number) {
            Ok(id) => watch.ids.push(id),
            Err(error) => {
                listeners().remove(&number);
                return Err(error);
            }
        }
        for (event, callback) in [
            (virt_sys::VIR_DOMAIN_EVENT_ID_REBOOT, Some(on_reset as _)),
            (virt_sys::VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, on_device),
            (virt_sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, on_device),
        ] {
            match register(connect, event, callback, number) {
                Ok(id) => {
                    watch.ids.push(id);
                    watch.tells_resets |= event == virt_sys::VIR_DOMAIN_EVENT_ID_REBOOT;
                }
                Err(error) => tracing::debug!(event, error = error.message(), "no such events"),
            }
        }
        Ok(watch)
    }

    /// Whether it tells that a domain was reset.
    pub(crate) fn tells_resets(&self) -> bool {
        self.tells_resets
    }

    /// Ends the registration on the connection that it was begun on.
    pub(crate) fn end(self, connect: &Connect) {
        listeners().remove(&self.number);
        for id in self.ids {
            // SAFETY: needed because `virt` does not wrap the call. `connect` is open and the number is the one that it gave out.
            let status = unsafe { virt_sys::virConnectDomainEventDeregisterAny(connect.as_ptr(), id) };
            if status != 0 {
                tracing::debug!(error = Error::last_error().message(), "domain events not unregistered");
            }
        }
    }
}

/// Registers a callback for one kind of event of all domains.
fn register(
    connect: &Connect,
    event: virt_sys::virDomainEventID,
    callback: virt_sys::virConnectDomainEventGenericCallback,
    number: usize,
) -> Result<c_int, Error> {
    let opaque = std::ptr::without_provenance_mut::<c_void>(number);
    let event = c_int::try_from(event).unwrap_or_default();
    let all = std::ptr::null_mut();
    let register = virt_sys::virConnectDomainEventRegisterAny;
    // SAFETY: needed because `virt` does not wrap the call. `connect` is open (it is borrowed), a null domain means all of them, the
    // callback is one of the kind that libvirt calls for this event, and `opaque` is a plain number that is never dereferenced,
    // so nothing has to be freed: hence no free function.
    let id = unsafe { register(connect.as_ptr(), all, event, callback, opaque, None) };
    if id < 0 { Err(Error::last_error()) } else { Ok(id) }
}

fn listeners() -> MutexGuard<'static, HashMap<usize, Listener>> {
    LISTENERS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

/// Asks libvirt to end the job that it is doing with a domain.
///
/// # Errors
/// There is none (any more), or it cannot be ended now.
pub(crate) fn abort_job(domain: &Domain) -> Result<(), Error> {
    // SAFETY: needed because `virt` does not wrap the call. Sound because the handle is open as long as it is borrowed.
    if unsafe { virt_sys::virDomainAbortJob(domain.as_ptr()) } == 0 { Ok(()) } else { Err(Error::last_error()) }
}

/// The job that libvirt is doing with a domain: its `virDomainJobType`, and its `virDomainJobOperation` if it says.
///
/// # Errors
/// The driver knows no jobs, or the domain is not active.
pub(crate) fn job(domain: &Domain) -> Result<(c_int, Option<c_int>), Error> {
    let (mut kind, mut parameters, mut count) = (0, std::ptr::null_mut(), 0);
    // SAFETY: needed because `virt`'s own wrapper makes a `Vec` of libvirt's array, which is null where there is no job. Sound because the
    // handle is open as long as it is borrowed, and libvirt writes to the three places during the call only.
    let status = unsafe {
        virt_sys::virDomainGetJobStats(domain.as_ptr(), &raw mut kind, &raw mut parameters, &raw mut count, 0)
    };
    if status != 0 {
        return Err(Error::last_error());
    }
    let mut operation = 0;
    // SAFETY: needed to read libvirt's array. Sound because it is the one that libvirt has just made, with its length (a null one has none),
    // the name ends with a NUL, and the value is written during the call only.
    let found = unsafe { virt_sys::virTypedParamsGetInt(parameters, count, c"operation".as_ptr(), &raw mut operation) };
    // SAFETY: needed because the array is ours to free. Sound because nothing of it is used any more; null is permitted.
    unsafe { virt_sys::virTypedParamsFree(parameters, count) };
    Ok((kind, (found == 1).then_some(operation)))
}

/// The type of [`on_lifecycle`].
type LifecycleCallback =
    Option<unsafe extern "C" fn(virt_sys::virConnectPtr, virt_sys::virDomainPtr, c_int, c_int, *mut c_void) -> c_int>;

/// The type of [`on_device`].
type DeviceCallback =
    Option<unsafe extern "C" fn(virt_sys::virConnectPtr, virt_sys::virDomainPtr, *const c_char, *mut c_void)>;

/// Called by libvirt with the number given at registration. What happened is not looked at, but for the one thing that cannot be asked for
/// later: whoever listens asks how things are now, so that events that are lost, doubled or late do no harm.
unsafe extern "C" fn on_lifecycle(
    _connect: virt_sys::virConnectPtr,
    domain: virt_sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    if is_leaving(event, detail) {
        // SAFETY: as below.
        unsafe { tell(domain, opaque, News::Leaving) };
    }
    // SAFETY: needed and sound as `tell` says; libvirt lends the domain for the time of the callback.
    unsafe { tell(domain, opaque, News::Changed) };
    0
}

/// Whether an event says that a domain was stopped here for the other host to go on with it.
fn is_leaving(event: c_int, detail: c_int) -> bool {
    let leaving = [
        virt_sys::VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED,
        virt_sys::VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY,
        virt_sys::VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY_FAILED,
    ];
    u32::try_from(event) == Ok(virt_sys::VIR_DOMAIN_EVENT_SUSPENDED)
        && u32::try_from(detail).is_ok_and(|detail| leaving.contains(&detail))
}

/// Called by libvirt with the number given at registration.
unsafe extern "C" fn on_reset(_connect: virt_sys::virConnectPtr, domain: virt_sys::virDomainPtr, opaque: *mut c_void) {
    // SAFETY: as above.
    unsafe { tell(domain, opaque, News::Reset) };
}

/// Called by libvirt with the number given at registration.
unsafe extern "C" fn on_device(
    _connect: virt_sys::virConnectPtr,
    domain: virt_sys::virDomainPtr,
    _alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: as above.
    unsafe { tell(domain, opaque, News::Changed) };
}

/// Tells the listener that a callback's `opaque` stands for.
///
/// # Safety
/// `domain` must be a valid domain handle for the time of the call.
unsafe fn tell(domain: virt_sys::virDomainPtr, opaque: *mut c_void, news: fn(Uuid) -> News) {
    let mut uuid = [0_u8; 16];
    // SAFETY: needed to learn which domain it is; `virt`'s own type would free the domain, which is libvirt's. Sound because the caller
    // vouches for the domain, and libvirt writes VIR_UUID_BUFLEN (16) bytes. It asks nobody: no call is made.
    let status = unsafe { virt_sys::virDomainGetUUID(domain, uuid.as_mut_ptr()) };
    // Cloned out: the listener is not called with the lock held.
    let listener = listeners().get(&opaque.addr()).cloned();
    if let (0, Some(listener)) = (status, listener) {
        listener(news(Uuid::from_bytes(uuid)));
    }
}
