//! What a domain has beside its emulator and can outlive that: helpers, and writes to its images.
//!
//! It is collected from the emulator's descriptors, its control group, libvirt's PID files and the
//! definition, each time that the table looks at the domain. It is kept after the emulator's death,
//! and the next daemon finds it in the state directory. Whether something is left is never
//! remembered: the kernel is asked each time.
//!
//! # Whose write is it?
//!
//! A lock on bytes that QEMU locks, and that no living process carries, is a write under way (see
//! [`locks`](super::locks)):
//!
//! | its inode belongs to | what it means for the domain |
//! |---|---|
//! | an image that an emulator of this domain had open, or a file of its definition | failure until it is over |
//! | another domain, by the same rule | nothing |
//! | no known domain; this daemon saw the domain's last emulator, and its disks are the definition's | nothing |
//! | no known domain; the domain has block devices, or files that cannot be looked at | failure: it may be its |
//! | no known domain; all disks of the domain are files that are there | nothing |
//!
//! Most hosts have no such locks. Then one reading of the kernel's table is all that is done.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use fence_common::sync::lock;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::disks::{Disks, Resolved};
use super::helpers::{Helper, Whereabouts};
use super::left_behind::{Keeper, KeptFile, LeftBehind};
use super::locks::{self, Inode, Lock};

/// How often the kernel's table of locks is read while there is a write under way.
const LOOK: Duration = Duration::from_millis(1);
/// How many readings in a row must find nothing, where a reading may miss something.
const AGREE: u32 = 3;
/// How long a look may take beyond its limit: the storage that a definition names may not answer.
const SLACK: Duration = Duration::from_secs(1);

/// What is known of one domain.
#[derive(Clone, Debug, Default)]
struct DomainImages {
    name: String,
    /// The emulator that was seen last.
    emulator: Option<i32>,
    /// What that had open and locked.
    images: BTreeSet<Inode>,
    /// What earlier emulators had, if it was not free when the next one came.
    older: BTreeSet<Inode>,
    helpers: Vec<Helper>,
    whereabouts: Option<Whereabouts>,
    /// By the definition; `None` if that was never seen.
    disks: Option<Disks>,
    /// The connection over which the emulator was seen. `None` if another one can have come after
    /// it, or its disks are not the definition's any more. With it, only `images` can be its.
    whole: Option<u64>,
}

impl DomainImages {
    /// The processes that may have its images open.
    fn family(&self, emulator: i32) -> Vec<i32> {
        let helpers = self.helpers.iter().filter(|helper| !helper.process.is_dead());
        std::iter::once(emulator).chain(helpers.map(|helper| helper.process.pid())).collect()
    }

    fn images(&self) -> impl Iterator<Item = &Inode> {
        self.images.iter().chain(&self.older)
    }

    /// What the next daemon has to know.
    fn kept(&self, uuid: Uuid) -> LeftBehind {
        LeftBehind {
            uuid,
            name: self.name.clone(),
            images: self.images().cloned().collect(),
            helpers: self.helpers.iter().map(|helper| helper.who.clone()).collect(),
            disks: self.disks.clone(),
        }
    }
}

/// The domains of one URI, and what they have.
#[derive(Debug, Default)]
pub(crate) struct Belongings {
    records: Mutex<HashMap<Uuid, DomainImages>>,
    keeper: Mutex<Option<Keeper>>,
}

/// A running instance, as it is observed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Running {
    /// libvirt's number of it.
    pub(crate) id: u32,
    /// Its emulator.
    pub(crate) pid: i32,
}

/// Whose writes are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WhichWrites {
    /// Those to images that an emulator of the domain is known to have had open.
    Known,
    /// Also those whose owner is unknown.
    All,
}

/// Writes that outlive their process.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Writes {
    Over,
    /// To these images of the domain.
    UnderWay(Vec<Inode>),
    /// To these, and they may be the domain's.
    Untold(Vec<Inode>),
}

impl Belongings {
    fn records(&self) -> MutexGuard<'_, HashMap<Uuid, DomainImages>> {
        lock(&self.records)
    }

    /// Takes over what an earlier daemon knew, and from now on writes down what the next one needs.
    /// The file in the state directory is named by the URI's number among those that lead to QEMU.
    pub(crate) fn keep_in(&self, directory: &Path, number: usize) {
        let file = KeptFile::new(directory, number);
        for kept in file.read() {
            let record = DomainImages {
                name: kept.name,
                images: kept.images.into_iter().collect(),
                helpers: kept.helpers.iter().filter_map(Helper::again).collect(),
                disks: kept.disks,
                ..DomainImages::default()
            };
            self.records().insert(kept.uuid, record);
        }
        *lock(&self.keeper) = Keeper::start(file);
    }

    /// Notes what there is of a domain now. `running` is `None` if the domain is off or its process
    /// is not known, `disks` if there was no definition. `generation`: the number of the
    /// connection.
    pub(crate) fn observe(
        &self,
        uuid: Uuid,
        name: &str,
        running: Option<Running>,
        disks: Option<Disks>,
        generation: u64,
    ) {
        let mut record = self.records().get(&uuid).cloned().unwrap_or_default();
        record.name = name.to_owned();
        if running.is_none() && (record.whole != Some(generation) || disks.is_some() && disks != record.disks) {
            record.whole = None;
        }
        record.disks = disks.or(record.disks);
        record.helpers.retain(|helper| !helper.process.is_dead());
        if let Some(Running { id, pid }) = running {
            if record.emulator != Some(pid) {
                record.older.append(&mut record.images);
                record.emulator = Some(pid);
            }
            let whereabouts = Whereabouts::of(pid, id, name);
            record.helpers = whereabouts.helpers(pid, &record.helpers);
            record.whereabouts = Some(whereabouts);
            // If it has just died, what was seen of it before stays.
            if let Ok(images) = images(&record.family(pid)) {
                record.images = images;
                record.whole = Some(generation);
            }
        }
        if !record.older.is_empty()
            && let Ok(orphans) = orphans(|lock| record.older.contains(&lock.inode))
        {
            record.older = orphans.into_iter().map(|lock| lock.inode).collect();
        }
        self.records().insert(uuid, record);
        self.keep();
    }

    /// libvirt knows no such domain any more. What is left of it is forgotten when it is over.
    pub(crate) fn forget(&self, uuid: Uuid) {
        let is_left = self.known_helpers(uuid).iter().any(|helper| !helper.process.is_dead());
        if !is_left && matches!(self.writes(uuid, WhichWrites::Known), Ok((Writes::Over, _))) {
            self.records().remove(&uuid);
            self.keep();
        }
    }

    /// Has the next daemon know what is known now.
    fn keep(&self) {
        let keeper = lock(&self.keeper);
        if let Some(keeper) = keeper.as_ref() {
            keeper.keep(self.records().iter().map(|(uuid, record)| record.kept(*uuid)).collect());
        }
    }

    /// Right before an emulator is killed: notes where its writes may go after its death.
    ///
    /// # Errors
    /// We may not look into the process.
    pub(crate) fn note_kill(&self, uuid: Uuid, pid: i32) -> io::Result<()> {
        let family = self.records().get(&uuid).map_or_else(|| vec![pid], |record| record.family(pid));
        let mut writers = Vec::new();
        for pid in family {
            match locks::has_ring(pid) {
                Ok(true) => writers.push(pid),
                Ok(false) => {}
                // A helper may have ended.
                Err(_) if !Path::new(&format!("/proc/{pid}")).exists() => {}
                Err(error) => return Err(error),
            }
        }
        let images = images(&writers)?;
        let mut records = self.records();
        let record = records.entry(uuid).or_default();
        if record.emulator.is_some_and(|emulator| emulator != pid) {
            record.older.append(&mut record.images);
        }
        record.emulator = Some(pid);
        record.images = images;
        Ok(())
    }

    /// The disks of a domain whose writes this host cannot see.
    pub(crate) fn unseen(&self, uuid: Uuid) -> Vec<String> {
        let records = self.records();
        let disks = records.get(&uuid).and_then(|record| record.disks.as_ref());
        disks.map(|disks| disks.unseen.clone()).unwrap_or_default()
    }

    /// The living helpers with their present children. Asked right before they are killed.
    pub(super) fn helpers_to_kill(&self, uuid: Uuid) -> Vec<Helper> {
        let known = self.known_helpers(uuid);
        if known.is_empty() {
            return known;
        }
        let all = super::helpers::with_children(known.clone());
        if all.len() > known.len() {
            if let Some(record) = self.records().get_mut(&uuid) {
                record.helpers.clone_from(&all);
            }
            self.keep();
        }
        all
    }

    /// The known helpers, dead ones too.
    fn known_helpers(&self, uuid: Uuid) -> Vec<Helper> {
        self.records().get(&uuid).map(|record| record.helpers.clone()).unwrap_or_default()
    }

    /// The helpers of a domain that live, also those that have come since it was last observed.
    pub(super) fn living_helpers(&self, uuid: Uuid) -> Vec<Helper> {
        let Some(record) = self.records().get(&uuid).cloned() else { return Vec::new() };
        let (Some(whereabouts), Some(emulator)) = (&record.whereabouts, record.emulator) else {
            return record.helpers.into_iter().filter(|helper| !helper.process.is_dead()).collect();
        };
        let known: Vec<_> = record.helpers.iter().map(|helper| helper.who.clone()).collect();
        let living = whereabouts.living(emulator, record.helpers);
        let news: Vec<_> = living.iter().filter(|helper| !known.contains(&helper.who)).cloned().collect();
        if !news.is_empty() {
            if let Some(record) = self.records().get_mut(&uuid) {
                record.helpers.extend(news);
            }
            self.keep();
        }
        living
    }

    /// Waits until no write of a domain is under way, at most until `by`.
    ///
    /// # Errors
    /// One is under way, or may be: to what, for people.
    pub(super) async fn settled(self: &Arc<Self>, uuid: Uuid, search: WhichWrites, by: Instant) -> Result<(), String> {
        if search == WhichWrites::Known
            && self.records().get(&uuid).is_none_or(|record| record.images().next().is_none())
        {
            return Ok(());
        }
        // The rule: nothing to wait for, and nothing here that could take time.
        if matches!(self.is_over_at_a_glance(uuid, search), Ok(true)) {
            return Ok(());
        }
        let (answer, answered) = oneshot::channel();
        let belongings = Arc::clone(self);
        let wait = move || drop(answer.send(belongings.settled_blocking(uuid, search, by)));
        if thread::Builder::new().name("host-writes".to_owned()).spawn(wait).is_err() {
            return Err("cannot start a thread that looks at the kernel's locks".to_owned());
        }
        let limit = tokio::time::Instant::from_std(by) + SLACK;
        match tokio::time::timeout_at(limit, answered).await {
            Ok(Ok(settled)) => settled,
            Ok(Err(_)) | Err(_) => Err("its disks cannot be looked at: their storage does not answer".to_owned()),
        }
    }

    /// As [`Self::settled`], for threads that may block.
    fn settled_blocking(&self, uuid: Uuid, search: WhichWrites, by: Instant) -> Result<(), String> {
        let mut agreed = 0;
        loop {
            let why = match self.writes(uuid, search) {
                Ok((Writes::Over, true)) => return Ok(()),
                Ok((Writes::Over, false)) => {
                    agreed += 1;
                    if agreed >= AGREE {
                        return Ok(());
                    }
                    thread::sleep(LOOK);
                    continue;
                }
                Ok((Writes::UnderWay(images), _)) => {
                    format!("the kernel has not done with its disk writes yet, to {}", images.join(", "))
                }
                Ok((Writes::Untold(images), _)) => {
                    format!("a dead emulator's disk writes are under way, and may be its: to {}", images.join(", "))
                }
                Err(error) => format!("the kernel's locks cannot be read: {error}"),
            };
            agreed = 0;
            if Instant::now() >= by {
                return Err(why);
            }
            thread::sleep(LOOK);
        }
    }

    /// Whether one look at the kernel's table is proof enough that no write is under way.
    fn is_over_at_a_glance(&self, uuid: Uuid, search: WhichWrites) -> io::Result<bool> {
        let (held, whole) = locks::held()?;
        let is_over = !held.into_keys().any(|lock| self.is_suspect(uuid, search, &lock));
        Ok(is_over && whole)
    }

    /// Whether a lock may be a write of the domain, if no process carries it.
    fn is_suspect(&self, uuid: Uuid, search: WhichWrites, lock: &Lock) -> bool {
        let records = self.records();
        let has = |record: &DomainImages| record.images().any(|inode| *inode == lock.inode);
        if records.get(&uuid).is_some_and(has) {
            return true;
        }
        search == WhichWrites::All && lock.is_qemus() && !records.values().any(has)
    }

    /// The writes of a domain, and whether the answer is sure.
    fn writes(&self, uuid: Uuid, search: WhichWrites) -> io::Result<(Writes, bool)> {
        let (held, sure) = locks::held()?;
        let suspects = held.into_iter().filter(|(lock, _)| self.is_suspect(uuid, search, lock)).collect();
        let orphans: BTreeSet<Inode> = locks::orphans(suspects)?.into_iter().map(|lock| lock.inode).collect();
        if orphans.is_empty() {
            return Ok((Writes::Over, sure));
        }
        let (own, others) = {
            let records = self.records();
            let others = records.iter().filter(|(other, _)| **other != uuid);
            let others: Vec<_> = others.filter_map(|(_, record)| record.disks.clone()).collect();
            (records.get(&uuid).cloned(), others)
        };
        let known = own.as_ref().map(|record| record.images().cloned().collect::<BTreeSet<_>>()).unwrap_or_default();
        let (mut own_ones, mut strange): (Vec<_>, Vec<_>) =
            orphans.into_iter().partition(|inode| known.contains(inode));
        let whole = own.as_ref().is_some_and(|record| record.whole.is_some());
        let Resolved { inodes, untold } = match own.and_then(|record| record.disks) {
            _ if strange.is_empty() || whole => Resolved::default(),
            Some(disks) => disks.resolve(),
            None => Resolved { inodes: BTreeSet::new(), untold: true },
        };
        own_ones.extend(strange.extract_if(.., |inode| inodes.contains(inode)));
        if !own_ones.is_empty() {
            return Ok((Writes::UnderWay(own_ones), sure));
        }
        if untold && !strange.is_empty() {
            for other in others {
                let Resolved { inodes, .. } = other.resolve();
                strange.retain(|inode| !inodes.contains(inode));
            }
            if !strange.is_empty() {
                return Ok((Writes::Untold(strange), sure));
            }
        }
        Ok((Writes::Over, sure))
    }
}

/// The images that these processes have locked.
///
/// # Errors
/// We may not look into the first of them, or it has ended.
fn images(family: &[i32]) -> io::Result<BTreeSet<Inode>> {
    let mut images = BTreeSet::new();
    for (number, pid) in family.iter().enumerate() {
        match locks::carried(*pid) {
            Ok(carried) => images.extend(carried.into_keys().map(|lock| lock.inode)),
            Err(error) if number == 0 => return Err(error),
            // A helper may have ended.
            Err(_) => {}
        }
    }
    Ok(images)
}

/// Of the locks that `wanted` selects, those that no living process carries.
fn orphans(wanted: impl Fn(&Lock) -> bool) -> io::Result<Vec<Lock>> {
    locks::orphans(locks::held()?.0.into_iter().filter(|(lock, _)| wanted(lock)).collect())
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;
    use tempfile::{TempDir, tempdir};

    /// An image with a write under way: nobody who lives has it open.
    fn busy(scratch: &TempDir, name: &str) -> (String, Inode, impl Sized) {
        let path = scratch.path().join(name);
        fs::write(&path, [0; 512]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        locks::tests::lock(&file, 100);
        let inode = locks::tests::inode_of(&file);
        let under_way = locks::tests::in_flight(&file);
        (path.display().to_string(), inode, under_way)
    }

    fn disks(path: &str) -> Option<Disks> {
        Some(
            Disks::of(&format!("<domain><devices><disk type='file'><source file='{path}'/></disk></devices></domain>"))
                .unwrap(),
        )
    }

    fn uuid(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    /// The table in the head of this file, with real locks.
    #[test]
    fn a_write_is_a_failure_of_whose_it_is_and_of_whose_it_may_be() {
        let _own = crate::hypervisor::tests::ORPHANS.blocking_lock();
        let scratch = tempdir().unwrap();
        let (_, image, under_way) = busy(&scratch, "known");
        let (defined, by_path, by_path_under_way) = busy(&scratch, "defined");
        let (_, strange, strange_under_way) = busy(&scratch, "strange");
        let belongings = Belongings::default();
        let enter = |number: u128, record: DomainImages| drop(belongings.records().insert(uuid(number), record));
        let there = || disks(scratch.path().join("known").to_str().unwrap());
        enter(1, DomainImages { images: [image.clone()].into(), ..DomainImages::default() });
        enter(2, DomainImages { older: [image.clone()].into(), disks: there(), ..DomainImages::default() });
        enter(3, DomainImages { disks: disks(&defined), ..DomainImages::default() });
        enter(4, DomainImages { disks: disks("/nonexistent/block/device"), whole: Some(1), ..DomainImages::default() });
        enter(5, DomainImages { disks: disks("/nonexistent/block/device"), ..DomainImages::default() });
        enter(6, DomainImages { disks: disks("/proc/self/status"), ..DomainImages::default() });
        let of = |number| belongings.writes(uuid(number), WhichWrites::All).unwrap().0;
        assert_eq!(of(1), Writes::UnderWay(vec![image.clone()]), "an image that was open");
        assert_eq!(of(2), Writes::UnderWay(vec![image.clone()]), "one that an earlier emulator had open");
        // On some file systems a path does not tell the inode.
        let is_told = there().unwrap().resolve().inodes.contains(&image);
        if is_told {
            assert_eq!(of(3), Writes::UnderWay(vec![by_path.clone()]), "a file of the definition");
        }
        assert_eq!(of(4), Writes::Over, "its emulator was seen, and had none of these");
        let untold = |writes| match writes {
            Writes::Untold(images) => images,
            other @ (Writes::Over | Writes::UnderWay(_)) => panic!("{other:?}"),
        };
        let may_be = untold(of(5));
        assert!(may_be.contains(&strange) && !may_be.contains(&image), "it is not another one's: {may_be:?}");
        assert_eq!(may_be.contains(&by_path), !is_told, "{may_be:?}");
        assert!(untold(of(7)).contains(&strange), "nothing is known of this one");
        assert!(matches!(belongings.writes(uuid(5), WhichWrites::Known), Ok((Writes::Over, _))));
        let soon = || Instant::now() + Duration::from_millis(20);
        assert!(belongings.settled_blocking(uuid(1), WhichWrites::Known, soon()).is_err());
        drop((under_way, by_path_under_way, strange_under_way));
        // Of the first nothing is known but the image: what else is under way on this host may be
        // its.
        assert!(matches!(belongings.writes(uuid(1), WhichWrites::Known), Ok((Writes::Over, _))));
        assert_eq!((of(2), of(3)), (Writes::Over, Writes::Over));
        assert_eq!(belongings.settled_blocking(uuid(1), WhichWrites::Known, soon()), Ok(()));
    }

    #[test]
    fn images_of_an_earlier_emulator_count_while_busy() {
        let _own = crate::hypervisor::tests::ORPHANS.blocking_lock();
        let scratch = tempdir().unwrap();
        let (_, image, under_way) = busy(&scratch, "first");
        let belongings = Belongings::default();
        let first = DomainImages { emulator: Some(1), images: [image.clone()].into(), ..DomainImages::default() };
        belongings.records().insert(uuid(1), first);
        let pid = i32::try_from(std::process::id()).unwrap();
        let observe = || belongings.observe(uuid(1), "x", Some(Running { id: 7, pid }), None, 1);
        observe();
        assert_eq!(belongings.records()[&uuid(1)].older, [image].into());
        assert!(matches!(belongings.writes(uuid(1), WhichWrites::Known), Ok((Writes::UnderWay(_), _))));
        belongings.forget(uuid(1));
        assert_eq!(belongings.records().len(), 1, "it is not over");
        drop(under_way);
        observe();
        assert!(belongings.records()[&uuid(1)].older.is_empty());
    }
}
