//! The orders: off, on and reboot, the restart that follows a reboot, and status. Only this room
//! changes domains.

pub(crate) mod by_libvirt;
mod fence_race;
mod foresight;
mod inherit;
mod kill;
mod locks;
mod meant;
mod off;
mod off_at;
mod on;
mod orders;
mod orphans;
mod outcome;
mod overtaken;
mod pause;
mod proof;
mod record;
pub(crate) mod reset;
mod restart;
mod restarts;
mod standing;
pub(crate) mod start;
pub(crate) mod status;

use self::fence_race::{Dying, Refused};
use self::locks::Held;
use self::meant::{Meant, Purpose, Search};
use self::off_at::OffAt;
use self::record::{Inherited, RecordFile};
use self::start::Started;

pub(crate) use self::fence_race::{FenceRaces, Fenced, Fencing};
pub(crate) use self::inherit::farewell;
pub(crate) use self::locks::{Locks, Settling};
pub(crate) use self::orders::Orders;
pub(crate) use self::proof::{Off, Source};
pub(crate) use self::record::{Record, Records};
pub(crate) use self::restart::Restarter;
pub(crate) use self::restarts::{FRESH, Pending, Plan, Restarts};
pub(crate) use self::standing::{is_defined, standing};

pub use self::fence_race::Requester;
pub use self::foresight::Foresight;
pub use self::outcome::{Detail, Outcome};
pub use self::proof::Unproven;
pub use self::standing::Standing;
pub use self::status::Presence;
