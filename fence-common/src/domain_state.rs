//! libvirt's numbers for a domain's state (`virDomainState`); a host list has them in one byte.

/// `VIR_DOMAIN_RUNNING`.
pub const RUNNING: u8 = 1;
/// `VIR_DOMAIN_BLOCKED`.
pub const BLOCKED: u8 = 2;
/// `VIR_DOMAIN_PAUSED`.
pub const PAUSED: u8 = 3;
/// `VIR_DOMAIN_SHUTDOWN`: about to be shut off.
pub const SHUTDOWN: u8 = 4;
/// `VIR_DOMAIN_SHUTOFF`.
pub const SHUT_OFF: u8 = 5;
/// `VIR_DOMAIN_CRASHED`.
pub const CRASHED: u8 = 6;
/// `VIR_DOMAIN_PMSUSPENDED`.
pub const SUSPENDED: u8 = 7;

/// The state in words, as messages and `status` have it.
#[must_use]
pub const fn name(state: u8) -> &'static str {
    match state {
        RUNNING => "running",
        BLOCKED => "blocked",
        PAUSED => "paused",
        SHUTDOWN => "shutting down",
        SHUT_OFF => "shut off",
        CRASHED => "crashed",
        SUSPENDED => "suspended",
        _ => "in an unknown state",
    }
}
