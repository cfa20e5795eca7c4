//! The little of libvirt that the `virt` crate does not wrap, or not soundly: the process-wide
//! set-up, the close callback, domain events and jobs.
//!
//! All `unsafe` code of this room is here.

use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread;
use std::time::Duration;

use fence_common::sync::lock;
use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;

/// What libvirt tells over a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// A domain was started, stopped, defined, undefined, renamed, suspended, resumed or moved, or
    /// a device came or went.
    Changed(Uuid),
    /// A domain was started or resumed, or has arrived from another host, and as which instance.
    Appeared(Uuid, Option<u32>),
    /// A domain was reset.
    Reset(Uuid),
    /// A domain was stopped because it is on its way to another host, where it may go on now.
    Leaving(Uuid),
    /// The connection is dead.
    Closed,
}

/// The kinds of news that libvirt tells over a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Told {
    /// What happens to domains.
    pub(crate) changes: bool,
    /// That a domain was reset.
    pub(crate) resets: bool,
}

/// What is called with the news, on libvirt's event thread. It must neither block nor call libvirt.
pub(super) type NewsHandler = Arc<dyn Fn(News) + Send + Sync>;

/// The listeners of the open connections, by the number that libvirt hands back as the callback's
/// opaque value.
///
/// A number and not a pointer: libvirt drivers differ in when, and whether, they free a callback's
/// data. A number needs no owner. A late callback finds no listener instead of freed memory.
static LISTENERS: OnceLock<Mutex<HashMap<usize, NewsHandler>>> = OnceLock::new();

/// The next number to give out.
static NEXT: AtomicUsize = AtomicUsize::new(1);

/// Prepares libvirt once for the whole process, before the first connection. Its errors go to us
/// and not to stderr. Its event loop runs, without which neither keepalive nor close callbacks
/// work. Call on a thread that may block.
pub(super) fn prepare() -> Result<(), Error> {
    static PREPARED: OnceLock<Result<(), Error>> = OnceLock::new();
    PREPARED
        .get_or_init(|| {
            virt::error::clear_error_callback();
            virt::event::event_register_default_impl()?;
            // Without this thread the process still serves requests, and notices dead connections
            // late.
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

/// A connection's callbacks. They must be ended before the connection is closed: libvirt's
/// registrations hold the connection.
pub(super) struct Watch {
    number: usize,
    /// The very pointer that was registered for the close callback. libvirt compares it, and Rust
    /// does not promise that a function has one address.
    close: Option<virt_sys::virConnectCloseFunc>,
    /// libvirt's numbers of the registrations for events.
    events: Vec<c_int>,
}

impl Watch {
    /// Has `listener` called when `connect` turns out dead. Drivers in our own process cannot lose
    /// a connection: they accept the callback and never call. Without the callback calls still end
    /// when the kernel ends the connection.
    pub(super) fn begin(connect: &Connect, listener: NewsHandler) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        listeners().insert(number, listener);
        let close: virt_sys::virConnectCloseFunc = Some(on_close);
        let opaque = std::ptr::without_provenance_mut::<c_void>(number);
        // SAFETY: needed because `virt` does not wrap the call. `connect` is open (it is borrowed,
        // and only `close` takes it). The callback has the C signature and lives as long as the
        // program. `opaque` is a plain number that is never dereferenced, so nothing has to be
        // freed: hence no free function.
        let status = unsafe { virt_sys::virConnectRegisterCloseCallback(connect.as_ptr(), close, opaque, None) };
        if status != 0 {
            tracing::debug!(error = Error::last_error().message(), "no close callback");
        }
        Self { number, close: (status == 0).then_some(close), events: Vec::new() }
    }

    /// Has the listener also called with what happens to domains. Tells which kinds of events the
    /// driver has.
    pub(super) fn listen(&mut self, connect: &Connect) -> Told {
        // SAFETY: needed because libvirt takes callbacks of all kinds of events as the one type of
        // the simplest, and C casts them. Sound because libvirt calls a callback of
        // VIR_DOMAIN_EVENT_ID_LIFECYCLE with exactly the arguments of `on_lifecycle`
        // (virConnectDomainEventCallback), and only libvirt ever calls the pointer.
        let on_lifecycle = unsafe {
            std::mem::transmute::<LifecycleCallback, virt_sys::virConnectDomainEventGenericCallback>(Some(on_lifecycle))
        };
        // SAFETY: needed as above. Sound because libvirt calls a callback of
        // VIR_DOMAIN_EVENT_ID_DEVICE_ADDED and of _REMOVED with exactly the arguments of
        // `on_device` (virConnectDomainEventDeviceAddedCallback and its twin).
        let on_device = unsafe {
            std::mem::transmute::<DeviceCallback, virt_sys::virConnectDomainEventGenericCallback>(Some(on_device))
        };
        let changes = self.register(connect, virt_sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, on_lifecycle);
        if !changes {
            return Told::default();
        }
        let resets = self.register(connect, virt_sys::VIR_DOMAIN_EVENT_ID_REBOOT, Some(on_reset as _));
        self.register(connect, virt_sys::VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, on_device);
        self.register(connect, virt_sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, on_device);
        Told { changes, resets }
    }

    /// Registers a callback for one kind of event of all domains. `false`: there are no such
    /// events.
    fn register(
        &mut self,
        connect: &Connect,
        event: virt_sys::virDomainEventID,
        callback: virt_sys::virConnectDomainEventGenericCallback,
    ) -> bool {
        let opaque = std::ptr::without_provenance_mut::<c_void>(self.number);
        let number = c_int::try_from(event).unwrap_or_default();
        let all = std::ptr::null_mut();
        let register = virt_sys::virConnectDomainEventRegisterAny;
        // SAFETY: needed because `virt` does not wrap the call. `connect` is open (it is borrowed),
        // a null domain means all of them, the callback is one of the kind that libvirt calls for
        // this event, and `opaque` is a plain number that is never dereferenced, so nothing has to
        // be freed: hence no free function.
        let id = unsafe { register(connect.as_ptr(), all, number, callback, opaque, None) };
        if id < 0 {
            tracing::debug!(event, error = Error::last_error().message(), "no such events");
            return false;
        }
        self.events.push(id);
        true
    }

    /// Ends the registrations on the connection that they were begun on.
    pub(super) fn end(&mut self, connect: &Connect) {
        // Without a listener the close callback was called, which ended its registration.
        let was_called = listeners().remove(&self.number).is_none();
        for id in self.events.drain(..) {
            // SAFETY: needed because `virt` does not wrap the call. `connect` is open (as above),
            // and the number is the one that it gave out.
            let status = unsafe { virt_sys::virConnectDomainEventDeregisterAny(connect.as_ptr(), id) };
            if status != 0 {
                tracing::debug!(error = Error::last_error().message(), "domain events not unregistered");
            }
        }
        let Some(close) = self.close.take().filter(|_| !was_called) else { return };
        // SAFETY: needed because `virt` does not wrap the call. `connect` is open (as above) and
        // the pointer is the registered one. A driver without close callbacks only returns an
        // error.
        let status = unsafe { virt_sys::virConnectUnregisterCloseCallback(connect.as_ptr(), close) };
        if status != 0 {
            tracing::debug!(error = Error::last_error().message(), "close callback not unregistered");
        }
    }
}

/// The listeners, whatever happened to a thread that held them: a map of callbacks is whole between
/// any two of its operations.
fn listeners() -> MutexGuard<'static, HashMap<usize, NewsHandler>> {
    lock(LISTENERS.get_or_init(Mutex::default))
}

/// Called by libvirt with the number given at registration, at most once.
extern "C" fn on_close(_connect: virt_sys::virConnectPtr, _reason: c_int, opaque: *mut c_void) {
    // Taken out first: the listener is not called with the lock held.
    let listener = listeners().remove(&opaque.addr());
    if let Some(listener) = listener {
        listener(News::Closed);
    }
}

/// Asks libvirt to end the job that it is doing with a domain.
///
/// # Errors
/// There is no job (any more), or it cannot be ended now.
pub(super) fn abort_job(domain: &Domain) -> Result<(), Error> {
    // SAFETY: needed because `virt` does not wrap the call. Sound because the handle is open as
    // long as it is borrowed.
    if unsafe { virt_sys::virDomainAbortJob(domain.as_ptr()) } == 0 { Ok(()) } else { Err(Error::last_error()) }
}

/// The job that libvirt is doing with a domain: its `virDomainJobType`, and its
/// `virDomainJobOperation` if it says.
///
/// # Errors
/// The driver knows no jobs, or the domain is not active.
pub(super) fn job(domain: &Domain) -> Result<(c_int, Option<c_int>), Error> {
    let (mut kind, mut parameters, mut count) = (0, std::ptr::null_mut(), 0);
    // SAFETY: needed because `virt`'s own wrapper makes a `Vec` of libvirt's array, which is null
    // where there is no job. Sound because the handle is open as long as it is borrowed, and
    // libvirt writes to the three places during the call only.
    let status = unsafe {
        virt_sys::virDomainGetJobStats(domain.as_ptr(), &raw mut kind, &raw mut parameters, &raw mut count, 0)
    };
    if status != 0 {
        return Err(Error::last_error());
    }
    let mut operation = 0;
    // SAFETY: needed to read libvirt's array. Sound because libvirt has just made it, with its
    // length (a null one has none), the name ends with a NUL, and the value is written during the
    // call only.
    let found = unsafe { virt_sys::virTypedParamsGetInt(parameters, count, c"operation".as_ptr(), &raw mut operation) };
    // SAFETY: needed because the array is ours to free. Sound because nothing of it is used any
    // more. Null is permitted.
    unsafe { virt_sys::virTypedParamsFree(parameters, count) };
    Ok((kind, (found == 1).then_some(operation)))
}

/// The type of [`on_lifecycle`].
type LifecycleCallback =
    Option<unsafe extern "C" fn(virt_sys::virConnectPtr, virt_sys::virDomainPtr, c_int, c_int, *mut c_void) -> c_int>;

/// The type of [`on_device`].
type DeviceCallback =
    Option<unsafe extern "C" fn(virt_sys::virConnectPtr, virt_sys::virDomainPtr, *const c_char, *mut c_void)>;

/// Called by libvirt with the number given at registration. What happened is not looked at: the
/// listener asks how things are now, so that lost, doubled or late events do no harm. The one
/// exception cannot be asked for later.
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
    let appeared = [virt_sys::VIR_DOMAIN_EVENT_STARTED, virt_sys::VIR_DOMAIN_EVENT_RESUMED];
    if u32::try_from(event).is_ok_and(|event| appeared.contains(&event)) {
        // SAFETY: needed because `virt`'s own type would free the domain. Sound because libvirt
        // lends it for the time of the callback. The number is in the handle, so no call is made.
        let id = unsafe { virt_sys::virDomainGetID(domain) };
        let id = (id != c_uint::MAX).then_some(id);
        // SAFETY: as below.
        unsafe { tell(domain, opaque, |uuid| News::Appeared(uuid, id)) };
    }
    // SAFETY: needed and sound as `tell` says; libvirt lends the domain for the time of the
    // callback.
    unsafe { tell(domain, opaque, News::Changed) };
    0
}

/// Whether an event says that a domain was stopped here for another host to go on with it.
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
unsafe fn tell(domain: virt_sys::virDomainPtr, opaque: *mut c_void, news: impl FnOnce(Uuid) -> News) {
    let mut uuid = [0_u8; 16];
    // SAFETY: needed to learn which domain it is; `virt`'s own type would free the domain, which is
    // libvirt's. Sound because the caller vouches for the domain, and libvirt writes
    // VIR_UUID_BUFLEN (16) bytes. It asks nobody: no call is made.
    let status = unsafe { virt_sys::virDomainGetUUID(domain, uuid.as_mut_ptr()) };
    // Cloned out: the listener is not called with the lock held.
    let listener = listeners().get(&opaque.addr()).cloned();
    if let (0, Some(listener)) = (status, listener) {
        listener(news(Uuid::from_bytes(uuid)));
    }
}
