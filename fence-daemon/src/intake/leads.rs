//! Logs where the interfaces lead: whether only guests of this host hear the requests.
//!
//! No answer depends on it. The pipeline asks the kernel at each request, and so does `status`.

use std::collections::BTreeMap;
use std::time::Duration;

use fence_config::Alone;
use fence_net::way_out::{self, WayOut};
use tokio::time::Instant;
use tracing::{info, warn};

use super::listening::HeardInterface;

/// The least time between two looks. Guests that start and stop send many messages about links.
const BETWEEN: Duration = Duration::from_secs(1);

/// When it is looked again at a way out that may end without a message.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// Where the interfaces lead.
#[derive(Debug)]
pub struct Leads {
    alone: Alone,
    looked: Option<Instant>,
    due: Option<Instant>,
    /// What was logged last, by the interface's name.
    told: BTreeMap<String, Option<String>>,
}

impl Leads {
    /// Nothing is logged yet.
    #[must_use]
    pub fn new(alone: Alone) -> Self {
        Self { alone, looked: None, due: None, told: BTreeMap::new() }
    }

    /// When to look again, even if nothing changes.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Looks where these interfaces lead, and logs what is new; later, if it has just looked.
    pub fn look(&mut self, heard: &[HeardInterface]) {
        if self.alone == Alone::No {
            return;
        }
        let now = Instant::now();
        if let Some(next) = self.looked.map(|looked| looked + BETWEEN).filter(|next| *next > now) {
            self.due = Some(self.due.map_or(next, |due| due.min(next)));
            return;
        }
        (self.looked, self.due) = (Some(now), None);
        let mut told = BTreeMap::new();
        for HeardInterface { interface, .. } in heard {
            // If the kernel does not say, the next change shows it.
            let Ok(ways) = way_out::of(interface.index) else { continue };
            if ways.iter().any(|way| way.unwatched) {
                self.due = Some(now + LOOK_AGAIN);
            }
            let way = ways.first().map(WayOut::to_string);
            if self.told.get(&interface.name) != Some(&way) {
                self.log(&interface.name, way.as_deref());
            }
            told.insert(interface.name.clone(), way);
        }
        self.told = told;
    }

    fn log(&self, interface: &str, way: Option<&str>) {
        match (self.alone, way) {
            (_, None) => info!("alone: {interface} leads nowhere"),
            (Alone::Yes, Some(way)) => {
                warn!(
                    "alone by the configuration, but {interface} leads out by {way}: another host may run what is off here"
                );
            }
            (Alone::Auto | Alone::No, Some(way)) => info!("not alone: {interface} leads out by {way}"),
        }
    }
}
