//! Members in wrong hands, and what they do with the keys they have.
//!
//! A stolen authority: says a wrong time and dates certificates by it, lets strangers in, makes them authorities, banishes plain members and
//! authorities that it may, makes an authority of whom others have put out, to bring it back, and signs every statement there is about authorities
//! and the founder that its key permits. A stolen plain member: signs all of these as well. It goes on doing what an honest one does, too, and does
//! not listen when it is told that it was put out. A stolen founder (`recovery.rs`) puts out and deposes everybody as well. Not in: packets that are
//! not well formed (`agent/tests/fleet_malice.rs`), silence of one node only.
//!
//! What it may get by that is what ARCHITECTURE.md says under "Threat model"; the laws are about the rest.

use data_encoding::BASE64URL_NOPAD;
use meshd_ca::identity::NodeId;
use meshd_ca::issue::Issuer;
use meshd_ca::keys::PrivateKey;
use meshd_ca::roster::{Entry, Member, Roster, Standing};
use meshd_ca::signed::Signed;
use rand::RngExt;

use super::disk::Res;
use super::world::World;

/// A statement that an honest program would not sign, well formed and with a good signature.
pub(crate) fn forge(signer: &PrivateKey, roster: &Roster, m: &Member) -> Entry {
    let roots: Vec<String> = m.roots.iter().map(|der| BASE64URL_NOPAD.encode(der)).collect();
    let payload = serde_json::json!({
        "mesh": roster.mesh(), "key": m.key, "name": m.name, "standing": m.standing, "roots": roots, "retired": m.retired,
        "since": m.since, "version": m.version, "signer": signer.public(),
    });
    let signed = Signed::new(signer, "roster", payload.to_string().into_bytes()).unwrap();
    Entry::from_bytes(&serde_json::to_vec(&signed).unwrap()).unwrap()
}

impl World {
    /// An authority falls into wrong hands.
    pub(crate) fn steal(&mut self) {
        let founder = self.truth.founder;
        let all: Vec<usize> =
            self.officials().into_iter().filter(|i| self.hosts[*i].id != founder && !self.hosts[*i].thief).collect();
        if let Some(i) = self.pick(&all) {
            (self.hosts[i].thief, self.truth.robbed) = (true, true);
            self.say(|_| format!("host {i}: an authority is in wrong hands"));
        }
    }

    /// One thing that a thief does.
    pub(crate) fn misuse(&mut self, i: usize) -> Res {
        self.truth.seen.attacks += 1;
        if self.hosts[i].id == self.truth.founder && self.rng.random_ratio(2, 3) {
            return self.reign(i);
        }
        match self.rng.random_range(0..10) {
            0 | 1 => {
                let day = 86_400;
                let lies = [5 * 365 * day, -365 * day, 20 * day, 73 * 365 * day, -300, 0];
                let lie = lies[self.rng.random_range(0..lies.len())];
                self.hosts[i].lie = Some(lie);
                self.say(|_| format!("host {i}: the thief's time is {lie} s off"));
                Ok(())
            }
            2 => self.smuggle(i),
            3 => self.put_out_somebody(i),
            8 | 9 => self.bring_back(i),
            _ if self.hosts[i].id == self.truth.founder => self.reign(i),
            _ => self.forge_about_somebody(i),
        }
    }

    fn smuggle(&mut self, i: usize) -> Res {
        let (stranger, thief, now) = (self.new_key(), self.hosts[i].id, self.mesh_time(i));
        let node = stranger.public().node_id();
        if self.index.contains_key(&node) || self.truth.smuggled.contains_key(&node) {
            return Ok(());
        }
        let wish = meshd_ca::identity::HostName::nearest("pi");
        let admitted = self.change(i, |roster, key| {
            roster.admit(key, stranger.public(), &wish, now)?;
            roster.entry(node).cloned().ok_or(meshd_ca::roster::RosterError::NotMember)
        })?;
        if admitted.is_err() {
            return Ok(());
        }
        self.truth.smuggled.insert(node, thief);
        self.say(|_| format!("host {i}: the thief lets the stranger {node} in"));
        let domain = self.roster(i).trust_domain().clone();
        if self.rng.random_ratio(1, 2) {
            let issuer = Issuer::create(&domain, node, now, self.ways.root_lifetime).unwrap();
            let root = issuer.root_der().to_vec();
            if self.change(i, |roster, key| roster.grant(key, node, vec![root]))?.is_ok() {
                self.truth.granted.insert(node);
                self.truth.granted_by.entry(node).or_default().insert(thief);
                self.say(|_| format!("host {i}: the thief makes {node} an authority"));
            }
        }
        Ok(())
    }

    fn put_out_somebody(&mut self, i: usize) -> Res {
        let me = self.hosts[i].id;
        let low: Vec<NodeId> = self.roster(i).active().map(Member::node).filter(|n| *n != me && !self.above(*n)).collect();
        let Some(n) = (!low.is_empty()).then(|| self.rng.random_range(0..low.len())) else { return Ok(()) };
        self.banish(i, low[n])
    }

    /// Makes somebody an authority whom others have put out: as if that had been before, by itself or by one that it makes for that.
    fn bring_back(&mut self, i: usize) -> Res {
        let roster = self.roster(i).clone();
        let out: Vec<&Member> = roster.members().filter(|m| m.standing == Standing::Banished).collect();
        let Some(me) = roster.member(self.hosts[i].id).filter(|m| !m.roots.is_empty()) else { return Ok(()) };
        let Some(n) = (!out.is_empty()).then(|| self.rng.random_range(0..out.len())) else { return Ok(()) };
        let (node, version) = (out[n].node(), [1, out[n].version, 1 << 40][self.rng.random_range(0..3)]);
        let office = Member { standing: Standing::Active, roots: me.roots.clone(), retired: false, version, ..out[n].clone() };
        let admission = Member { roots: Vec::new(), ..office.clone() };
        let t = &mut self.truth;
        t.granted.insert(node);
        t.granted_by.entry(node).or_default().insert(me.node());
        t.ended.insert(node);
        t.fallen.insert(node);
        t.seen.brought_back += 1;
        self.say(|w| format!("host {i}: the thief makes {} an authority, which is banished", w.name(node)));
        for word in [office, admission] {
            let entry = forge(self.hosts[i].key, &roster, &word);
            self.offer(i, &entry)?;
        }
        self.pump()
    }

    /// Any statement about anybody who has stood up as an authority, or about the founder; a plain member signs it about anybody.
    pub(crate) fn forge_about_somebody(&mut self, i: usize) -> Res {
        let roster = self.roster(i).clone();
        let me = roster.member(self.hosts[i].id).cloned();
        let Some(me) = me else { return Ok(()) };
        self.truth.tainted.insert(me.node());
        let office = self.truth.granted.contains(&me.node());
        let may = |m: &&Member| m.node() != me.node() && (!office || m.by == m.node() && m.standing == Standing::Active);
        let all: Vec<&Member> = roster.members().filter(may).collect();
        if all.is_empty() {
            return Ok(());
        }
        let victim = all[self.rng.random_range(0..all.len())];
        // That a key was replaced nobody says of it.
        let standing = if victim.standing == Standing::Replaced { Standing::Active } else { victim.standing };
        let m = Member { standing, version: victim.version + self.rng.random_range(0..1000), ..victim.clone() };
        let mine = me.roots.clone();
        let forged = match self.rng.random_range(0..7) {
            0 => Member { roots: Vec::new(), retired: false, ..m },
            1 => Member { roots: mine, retired: false, ..m },
            2 => Member { retired: true, ..m },
            3 => Member { retired: true, roots: Vec::new(), ..m },
            4 => Member { standing: Standing::Left, ..m },
            5 => Member { standing: Standing::Banished, ..m },
            _ => Member { standing: Standing::Banished, roots: Vec::new(), retired: false, ..m },
        };
        self.say(|w| {
            let what = format!("{:?}, {} roots, retired {}", forged.standing, forged.roots.len(), forged.retired);
            format!(
                "host {i}: forges about {}: {what}",
                w.index.get(&forged.node()).map_or("a stranger".into(), |j| format!("host {j}"))
            )
        });
        let entry = forge(self.hosts[i].key, &roster, &forged);
        self.offer(i, &entry)?;
        self.pump()
    }
}
