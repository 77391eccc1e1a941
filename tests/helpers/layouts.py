"""Tiny files in the layouts of public datasets, after their public descriptions, and the histories by hand.

The names are those of the table in docs/importing.md.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

Content = str | bytes | Callable[[Path], None]


class Layout(NamedTuple):
    """The files of a layout, the command that imports them, and what the dataset then holds."""

    files: Mapping[str, Content]  # of a folder "in"; a function writes the file at a path
    command: str  # behind `iisan-fast import`; OUT is the dataset
    users: str  # users.tsv
    times: str | None = None  # times.tsv; None: there is none
    titles: Mapping[str, str] = {}
    splits: str | None = None  # splits.tsv

    @property
    def shown(self) -> str:
        """Return the command as the page shows it."""
        return self.command.replace("in/", "").replace(" OUT", " DATASET")


def lines(*objects: dict) -> str:
    return "".join(json.dumps(value) + "\n" for value in objects)


def parquet(**columns: list) -> Callable[[Path], None]:
    import polars

    return lambda path: polars.DataFrame(columns).write_parquet(path)


def reviews(user: str, item: str, rating: str, time: str, unit: int = 1) -> str:
    rows = (
        ("A1XXXXXXXXXXXX", "B000000002", 30),
        ("A1XXXXXXXXXXXX", "B000000001", 10),
        ("A2YYYYYYYYYYYY", "B000000002", 20),
    )
    return lines(
        *({rating: 5.0, user: who, item: what, time: when * unit, "text": "so so"} for who, what, when in rows)
    )


AMAZON_USERS = "A1XXXXXXXXXXXX\tB000000001 B000000002\nA2YYYYYYYYYYYY\tB000000002\n"
AMAZON_TIMES = "A1XXXXXXXXXXXX\t10 30\nA2YYYYYYYYYYYY\t20\n"
AMAZON_TITLES = {"B000000001": "Comb", "B000000002": "Brush"}
GENRES = "|".join("0" * 19)
ATOMIC = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
SPLIT = {"train": "u,a,5.0,1\nu,b,4.0,2\nv,a,3.0,4\n", "valid": "u,c,5.0,3\n", "test": "u,d,5.0,9\nv,b,1.0,8\n"}
SPLIT_RESULT = {
    "users": "u\ta b c d\nv\ta b\n",
    "times": "u\t1 2 3 9\nv\t4 8\n",
    "splits": "u\t2 1 1\nv\t1 0 1\n",
}

LAYOUTS = {
    "CSV": Layout(
        {"ratings.csv": "user,item,timestamp\nu,b,2\nv,a,1\nu,a,1\n", "items.csv": 'item,title\na,"A, a"\nb,B\n'},
        "csv in/ratings.csv OUT --items in/items.csv",
        "u\ta b\nv\ta\n",
        "u\t1 2\nv\t1\n",
        {"a": "A, a", "b": "B"},
    ),
    "Text without a header": Layout(
        {"ratings.txt": "u;b;5;2\nv;a;4;1\nu;a;3;1\n"},
        "csv in/ratings.txt OUT --columns user,item,-,timestamp",
        "u\ta b\nv\ta\n",
        "u\t1 2\nv\t1\n",
    ),
    "JSON lines": Layout(
        {"log.jsonl": lines({"user": "u", "item": 7, "timestamp": 2}, {"user": "u", "item": 5, "timestamp": 1})},
        "jsonl in/log.jsonl OUT",
        "u\t5 7\n",
        "u\t1 2\n",
    ),
    "Parquet": Layout(
        {"log.parquet": lambda path: parquet(user=["u", "u"], item=[7, 5], timestamp=[2, 1])(path)},
        "parquet in/log.parquet OUT",
        "u\t5 7\n",
        "u\t1 2\n",
    ),
    "A folder of parts": Layout(
        {
            "log/part-2.parquet": lambda path: parquet(user=["u"], item=["b"])(path),
            "log/part-10.parquet": lambda path: parquet(user=["u"], item=["c"])(path),
            "log/part-1.parquet": lambda path: parquet(user=["u"], item=["a"])(path),
        },
        "parquet in/log OUT",
        "u\ta b c\n",
    ),
    "Several files": Layout(
        {"2023.csv": "user,item,timestamp\nu,a,1\nv,c,3\n", "2024.csv": "user,item,timestamp\nu,b,2\n"},
        "csv in/2023.csv in/2024.csv OUT",
        "u\ta b\nv\tc\n",
        "u\t1 2\nv\t3\n",
    ),
    "A row a user": Layout(
        {"histories.csv": "user,item\nu,a b c\nv,b\n"},
        'csv in/histories.csv OUT --item-separator " "',
        "u\ta b c\nv\tb\n",
    ),
    "Lists": Layout(
        {
            "histories.jsonl": lines(
                {"user": "u", "item": ["b", "a"], "timestamp": [2, 1]}, {"user": "v", "item": ["a"], "timestamp": [5]}
            )
        },
        "jsonl in/histories.jsonl OUT",
        "u\ta b\nv\ta\n",
        "u\t1 2\nv\t5\n",
    ),
    "A column of the split": Layout(
        {"log.csv": "user,item,timestamp,split\nu,a,1,train\nu,c,3,test\nu,b,2,val\n"},
        "csv in/log.csv OUT",
        "u\ta b c\n",
        "u\t1 2 3\n",
        splits="u\t1 1 1\n",
    ),
    "Three files of a split": Layout(
        {f"{part}.csv": "user,item,rating,timestamp\n" + rows for part, rows in SPLIT.items()},
        "csv in/train.csv OUT --validation in/valid.csv --test in/test.csv",
        **SPLIT_RESULT,
    ),
    "MovieLens 100K": Layout(
        {
            "ml-100k/u.data": "1\t20\t3\t881250949\n2\t10\t3\t891717742\n1\t10\t4\t878887116\n",
            "ml-100k/u.item": f"10|Amélie (2001)|01-Jan-2001||http://us.imdb.com/|{GENRES}\n"
            f"20|Heat (1995)|01-Jan-1995|||{GENRES}\n".encode("latin-1"),
            "ml-100k/u1.base": "1\t20\t3\t881250949\n",
        },
        "movielens in/ml-100k OUT",
        "1\t10 20\n2\t10\n",
        "1\t878887116 881250949\n2\t891717742\n",
        {"10": "Amélie (2001)", "20": "Heat (1995)"},
    ),
    "MovieLens 1M, 10M": Layout(
        {
            "ml-1m/ratings.dat": "1::20::5::978302109\n2::10::3::978302268\n1::10::3::978301968\n",
            "ml-1m/movies.dat": "10::Misérables, Les (1995)::Drama|Musical\n20::Heat (1995)::Action\n".encode(
                "latin-1"
            ),
            "ml-1m/users.dat": "1::F::1::10::48067\n",
        },
        "movielens in/ml-1m OUT --min-rating 3",
        "1\t10 20\n2\t10\n",
        "1\t978301968 978302109\n2\t978302268\n",
        {"10": "Misérables, Les (1995)", "20": "Heat (1995)"},
    ),
    "MovieLens 20M, 25M, 32M, latest": Layout(
        {
            "ml-latest/ratings.csv": "userId,movieId,rating,timestamp\n1,20,4.0,964982703\n1,10,4.5,964981247\n",
            "ml-latest/movies.csv": 'movieId,title,genres\n10,"Misérables, Les (1995)",Drama\n20,Heat (1995),Action\n',
            "ml-latest/tags.csv": "userId,movieId,tag,timestamp\n1,20,tense,1\n",
        },
        "movielens in/ml-latest OUT",
        "1\t10 20\n",
        "1\t964981247 964982703\n",
        {"10": "Misérables, Les (1995)", "20": "Heat (1995)"},
    ),
    "Amazon 2014, 2018 reviews": Layout(
        {
            "amazon/All_Beauty.json.gz": gzip.compress(
                reviews("reviewerID", "asin", "overall", "unixReviewTime").encode()
            ),
            "amazon/meta_All_Beauty.json.gz": gzip.compress(
                lines({"asin": "B000000001", "title": "Comb"}, {"title": "Brush", "asin": "B000000002"}).encode()
            ),
        },
        "amazon in/amazon OUT",
        AMAZON_USERS,
        AMAZON_TIMES,
        AMAZON_TITLES,
    ),
    "Amazon 2023 reviews": Layout(
        {
            "All_Beauty.jsonl": reviews("user_id", "parent_asin", "rating", "timestamp"),
            "meta_All_Beauty.jsonl": lines(
                {"parent_asin": "B000000001", "title": "Comb", "images": []},
                {"title": "Brush", "parent_asin": "B000000002"},
            ),
        },
        "amazon in/All_Beauty.jsonl in/meta_All_Beauty.jsonl OUT",
        AMAZON_USERS,
        AMAZON_TIMES,
        AMAZON_TITLES,
    ),
    "Amazon 2014 ratings": Layout(
        {
            "amazon/ratings_Beauty.csv": "A1XXXXXXXXXXXX,B000000002,5.0,30\nA1XXXXXXXXXXXX,B000000001,3.0,10\n"
            "A2YYYYYYYYYYYY,B000000002,4.0,20\n",
            "amazon/meta_Beauty.json": "{'asin': 'B000000001', 'title': \"Comb\"}\n"
            "{'asin': 'B000000002', 'title': 'Brush'}\n",
        },
        "amazon in/amazon OUT",
        AMAZON_USERS,
        AMAZON_TIMES,
        AMAZON_TITLES,
    ),
    "Amazon 2018 ratings": Layout(
        {
            "All_Beauty.csv": "B000000002,A1XXXXXXXXXXXX,5.0,30\nB000000001,A1XXXXXXXXXXXX,3.0,10\n"
            "B000000002,A2YYYYYYYYYYYY,4.0,20\n",
        },
        "amazon in/All_Beauty.csv OUT",
        AMAZON_USERS,
        AMAZON_TIMES,
    ),
    "Amazon 2023 benchmarks": Layout(
        {f"5core/Toys.{part}.csv": "user_id,parent_asin,rating,timestamp\n" + rows for part, rows in SPLIT.items()},
        "amazon in/5core OUT",
        **SPLIT_RESULT,
    ),
    "Amazon 2023 benchmarks with histories": Layout(
        {
            "Toys.train.csv": "user_id,parent_asin,rating,timestamp,history\nu,a,5.0,1,\nu,b,5.0,2,a\n",
            "Toys.valid.csv": "user_id,parent_asin,rating,timestamp,history\nu,c,5.0,3,a b\n",
            "Toys.test.csv": "user_id,parent_asin,rating,timestamp,history\nu,d,5.0,4,a b c\n",
        },
        "amazon in/Toys.test.csv in/Toys.train.csv in/Toys.valid.csv OUT",
        "u\ta b c d\n",
        "u\t1 2 3 4\n",
        splits="u\t2 1 1\n",
    ),
    "RecBole": Layout(
        {
            "ml/ml.inter": ATOMIC + "u\tb\t5\t2.0\nu\ta\t4\t1.0\n",
            "ml/ml.item": 'item_id:token\ttitle:token_seq\tclass:token_seq\na\tA "a"\tx y\nb\tB\tz\n',
        },
        "recbole in/ml OUT",
        "u\ta b\n",
        "u\t1 2\n",
        {"a": 'A "a"', "b": "B"},
    ),
    "RecBole without times": Layout(
        {"x.inter": "user_id:token\titem_id:token\nu\tb\nu\ta\n"}, "recbole in/x.inter OUT", "u\tb a\n"
    ),
    "RecBole benchmark files": Layout(
        {f"x/x.{part}.inter": ATOMIC + rows.replace(",", "\t") for part, rows in SPLIT.items()},
        "recbole in/x OUT",
        **SPLIT_RESULT,
    ),
    "RecBole histories beside items": Layout(
        {
            "x/x.train.inter": "user_id:token\titem_id_list:token_seq\titem_id:token\nu\ta\tb\nu\ta b\tc\n",
            "x/x.valid.inter": "user_id:token\titem_id_list:token_seq\titem_id:token\nu\tb c\td\n",
            "x/x.test.inter": "user_id:token\titem_id_list:token_seq\titem_id:token\nu\tc d\te\n",
        },
        "recbole in/x OUT",
        "u\ta b c d e\n",
        splits="u\t3 1 1\n",
    ),
    "RecBole parts": Layout(
        {"x/x.part1.inter": ATOMIC + "u\tb\t5\t2\n", "x/x.part2.inter": ATOMIC + "u\ta\t5\t1\n"},
        "recbole in/x OUT",
        "u\ta b\n",
        "u\t1 2\n",
    ),
    "MicroLens": Layout(
        {
            "M/MicroLens-50k_pairs.csv": "user,item,timestamp\n1,20,1583378629552\n1,10,1583378500000\n",
            "M/MicroLens-50k_titles.csv": "item,title\n10,Cat, and dog\n20,Fish\n",
        },
        "microlens in/M OUT",
        "1\t10 20\n",
        "1\t1583378500000 1583378629552\n",
        {"10": "Cat, and dog", "20": "Fish"},
    ),
    "MicroLens histories": Layout(
        {
            "M/MicroLens-100k_pairs.tsv": "1\t20 10\n2\t10\n",
            "M/MicroLens-100k_title_en.csv": "10,Cat\n20,Fish\n",
        },
        "microlens in/M OUT",
        "1\t20 10\n2\t10\n",
        titles={"10": "Cat", "20": "Fish"},
    ),
    "MMRec": Layout(
        {
            "baby/baby.inter": "userID\titemID\trating\ttimestamp\tx_label\n"
            "0\t1\t5.0\t30\t2\n0\t0\t4.0\t10\t0\n1\t0\t5.0\t5\t0\n",
            "baby/i_id_mapping.csv": "asin\titemID\nB000000001\t0\nB000000002\t1\n",
        },
        "mmrec in/baby OUT",
        "0\t0 1\n1\t0\n",
        "0\t10 30\n1\t5\n",
        splits="0\t1 0 1\n1\t1 0 0\n",
    ),
    "IISAN": Layout(
        {
            "Scientific/Industrial_and_Scientific_items.tsv": 'B1\tRuler, 12" long\nB2\tGloves\n',
            "Scientific/am_Industrial_and_Scientific_users.tsv": "A1\tB2 B1 B2\nA2\tB1\n",
        },
        "iisan in/Scientific OUT",
        "A1\tB2 B1 B2\nA2\tB1\n",
        titles={"B1": 'Ruler, 12" long', "B2": "Gloves"},
    ),
    "ReChorus": Layout(
        {
            "train.csv": "user_id\titem_id\ttime\n1\t20\t7\n1\t10\t5\n",
            "dev.csv": "user_id\titem_id\ttime\tneg_items\n1\t30\t8\t[40, 50]\n",
            "test.csv": "user_id\titem_id\ttime\tneg_items\n1\t40\t9\t[20, 50]\n",
        },
        "csv in/train.csv OUT --validation in/dev.csv --test in/test.csv --user-column user_id --item-column item_id "
        "--timestamp-column time",
        "1\t10 20 30 40\n",
        "1\t5 7 8 9\n",
        splits="1\t2 1 1\n",
    ),
    "H&M": Layout(
        {
            "transactions_train.csv": "t_dat,customer_id,article_id,price,sales_channel_id\n"
            "2018-09-21,0000abc,0108775015,0.05,2\n2018-09-20,0000abc,0663713001,0.03,2\n",
            "articles.csv": "article_id,product_code,prod_name\n"
            "0108775015,0108775,Strap top\n0663713001,0663713,Atlanta\n",
        },
        "csv in/transactions_train.csv OUT --user-column customer_id --item-column article_id --timestamp-column t_dat "
        "--items in/articles.csv --title-column prod_name",
        "0000abc\t0663713001 0108775015\n",
        None,
        {"0108775015": "Strap top", "0663713001": "Atlanta"},
    ),
    "KuaiRec": Layout(
        {
            "big_matrix.csv": "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio\n"
            "0,8,7,9,2020-07-05 05:27:48.378,20200705,1593898068.378,0.7\n"
            "0,7,7,9,2020-07-05 05:27:48.300,20200705,1593898068.3,0.7\n",
        },
        "csv in/big_matrix.csv OUT --user-column user_id --item-column video_id",
        "0\t7 8\n",
        None,
    ),
    "Tenrec": Layout(
        {
            "sbr_data_1M.csv": "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age\n"
            "1,20,1,0,0,0,1,1,1,4\n1,10,1,0,0,0,1,2,1,4\n"
        },
        "csv in/sbr_data_1M.csv OUT --user-column user_id --item-column item_id",
        "1\t20 10\n",
    ),
    "Yelp": Layout(
        {
            "yelp_academic_dataset_review.json": lines(
                {"review_id": "r", "user_id": "u", "business_id": "b", "stars": 5.0, "date": "2018-07-07 22:09:11"},
                {"review_id": "s", "user_id": "u", "business_id": "a", "stars": 2.0, "date": "2012-01-03 15:28:18"},
            ),
            "yelp_academic_dataset_business.json": lines(
                {"business_id": "a", "name": "Diner"}, {"business_id": "b", "name": "Café"}
            ),
        },
        "jsonl in/yelp_academic_dataset_review.json OUT --user-column user_id --item-column business_id "
        "--timestamp-column date --items in/yelp_academic_dataset_business.json --title-column name",
        "u\ta b\n",
        None,
        {"a": "Diner", "b": "Café"},
    ),
    "Steam": Layout(
        {
            "steam_reviews.json": "{u'username': u'Chaos', u'product_id': u'725280', u'date': u'2017-12-17'}\n"
            "{u'username': u'Chaos', u'product_id': u'328100', u'date': u'2016-01-02'}\n",
            "steam_games.json": "{u'id': u'328100', u'title': u'Ghost'}\n"
            "{u'id': u'725280', u'title': u\"Who's there\"}\n",
        },
        "jsonl in/steam_reviews.json OUT --user-column username --item-column product_id --timestamp-column date "
        "--items in/steam_games.json --items-id-column id",
        "Chaos\t328100 725280\n",
        None,
        {"328100": "Ghost", "725280": "Who's there"},
    ),
    "MIND": Layout(
        {
            "behaviors.tsv": "1\tU1\t11/11/2019 9:05:58 AM\tN1 N2\tN3-0 N4-1\n"
            "2\tU1\t11/12/2019 6:11:30 PM\tN1 N2\tN5-1\n",
            "news.tsv": 'N1\tsports\tgolf\tA "long" day\tabstract\turl\t[]\t[]\n'
            "N2\tnews\tworld\tTalks\t\turl\t[]\t[]\n",
        },
        'csv in/behaviors.tsv OUT --columns -,user,-,item,- --item-separator " " --duplicates first '
        "--items in/news.tsv --items-columns item,-,-,title,-,-,-,-",
        "U1\tN1 N2\n",
        None,
        {"N1": 'A "long" day', "N2": "Talks"},
    ),
    "Book-Crossing": Layout(
        {
            "BX-Book-Ratings.csv": '"User-ID";"ISBN";"Book-Rating"\n'
            '"276725";"034545104X";"0"\n"276725";"0155061224";"5"\n',
            "BX-Books.csv": '"ISBN";"Book-Title";"Book-Author"\n"034545104X";"Flesh; Tones";"M. Rosé"\n'
            '"0155061224";"Rites";"J. Doe"\n'.encode("latin-1"),
        },
        "csv in/BX-Book-Ratings.csv OUT --user-column User-ID --item-column ISBN --encoding latin-1 "
        "--items in/BX-Books.csv --title-column Book-Title",
        "276725\t034545104X 0155061224\n",
        None,
        {"034545104X": "Flesh; Tones", "0155061224": "Rites"},
    ),
    "Gowalla": Layout(
        {
            "Gowalla_totalCheckins.txt": "0\t2010-10-19T23:55:27Z\t30.23\t-97.79\t22847\n"
            "0\t2010-10-18T22:17:43Z\t30.26\t-97.76\t420315\n",
        },
        "csv in/Gowalla_totalCheckins.txt OUT --columns user,timestamp,-,-,item",
        "0\t420315 22847\n",
        None,
    ),
    "Last.fm 1K": Layout(
        {
            "plays.tsv": 'user_1\t2009-05-04T23:08:57Z\ta2\tDeep "Dish"\tt1\tTwo\n'
            "user_1\t2009-05-04T13:54:10Z\ta1\tUnderworld\tt2\tBorn\n",
        },
        "csv in/plays.tsv OUT --columns user,timestamp,item,-,-,- "
        "--items in/plays.tsv --items-columns -,-,item,title,-,-",
        "user_1\ta1 a2\n",
        None,
        {"a1": "Underworld", "a2": 'Deep "Dish"'},
    ),
    "Diginetica": Layout(
        {
            "train-item-views.csv": "sessionId;userId;itemId;timeframe;eventdate\n1;NA;81766;526309;2016-05-09\n"
            "1;NA;31331;1031018;2016-05-09\n1;NA;32118;243569;2016-05-09\n",
        },
        "csv in/train-item-views.csv OUT --user-column sessionId --item-column itemId --timestamp-column timeframe",
        "1\t32118 81766 31331\n",
        "1\t243569 526309 1031018\n",
    ),
    "RetailRocket": Layout(
        {
            "events.csv": "timestamp,visitorid,event,itemid,transactionid\n1433221332117,257597,view,355908,\n"
            "1433221078505,257597,view,248676,\n",
        },
        "csv in/events.csv OUT --user-column visitorid --item-column itemid",
        "257597\t248676 355908\n",
        "257597\t1433221078505 1433221332117\n",
    ),
    "Yoochoose": Layout(
        {"yoochoose-clicks.dat": "1,2014-04-07T10:54:09.868Z,214536500,0\n1,2014-04-07T10:51:09.277Z,214536502,0\n"},
        "csv in/yoochoose-clicks.dat OUT --columns user,timestamp,item,-",
        "1\t214536502 214536500\n",
        None,
    ),
    "Pairs of SASRec": Layout(
        {"Beauty.txt": "1 20\n1 10\n2 10\n"},
        "csv in/Beauty.txt OUT --columns user,item --separator space",
        "1\t20 10\n2\t10\n",
    ),
    "Lines of a user and items": Layout(
        {"Beauty.txt": "1 20 10 20\n2 10\n"},
        'csv in/Beauty.txt OUT --columns user,item --separator " " --item-separator " "',
        "1\t20 10 20\n2\t10\n",
    ),
}
