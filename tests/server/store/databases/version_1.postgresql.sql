CREATE TABLE embeddings (
    key character varying(128) NOT NULL,
    model character varying(128) NOT NULL,
    vector bytea NOT NULL,
    created_at double precision NOT NULL
);
CREATE TABLE evaluation_cells (
    evaluation_id character varying(64) NOT NULL,
    place integer NOT NULL,
    result json NOT NULL
);
CREATE TABLE evaluations (
    id character varying(64) NOT NULL,
    support_set character varying(64) NOT NULL,
    version integer NOT NULL,
    status character varying(16) NOT NULL,
    plan json NOT NULL,
    queries_done integer NOT NULL,
    created_at double precision NOT NULL,
    started_at double precision,
    finished_at double precision,
    error json,
    holder character varying(64) NOT NULL,
    held_until double precision NOT NULL
);
CREATE TABLE example_media (
    row_id bigint NOT NULL,
    place integer NOT NULL,
    media_id character varying(80) NOT NULL
);
CREATE TABLE examples (
    row_id bigint NOT NULL,
    set_id character varying(64) NOT NULL,
    example_id character varying(128) NOT NULL,
    place integer NOT NULL,
    first_version integer NOT NULL,
    end_version integer,
    text character varying NOT NULL,
    question character varying NOT NULL,
    label character varying NOT NULL,
    metadata json NOT NULL
);
CREATE SEQUENCE examples_row_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE examples_row_id_seq OWNED BY examples.row_id;
CREATE TABLE first_answers (
    scope character varying(64) NOT NULL,
    key character varying(256) NOT NULL,
    request_digest character varying(64) NOT NULL,
    answer json NOT NULL,
    created_at double precision NOT NULL
);
CREATE TABLE fits (
    set_id character varying(64) NOT NULL,
    version integer NOT NULL,
    method character varying(32) NOT NULL,
    model character varying(128) NOT NULL,
    format integer NOT NULL,
    arrays bytea NOT NULL,
    created_at double precision NOT NULL
);
CREATE TABLE media (
    media_id character varying(80) NOT NULL,
    num_bytes bigint NOT NULL,
    is_uploaded boolean NOT NULL
);
CREATE TABLE media_leases (
    holder character varying(64) NOT NULL,
    media_id character varying(80) NOT NULL,
    expires_at double precision NOT NULL
);
CREATE TABLE schema_version (
    id integer NOT NULL,
    version integer NOT NULL
);
CREATE SEQUENCE schema_version_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE schema_version_id_seq OWNED BY schema_version.id;
CREATE TABLE support_set_versions (
    set_id character varying(64) NOT NULL,
    version integer NOT NULL,
    created_at double precision NOT NULL,
    num_examples integer NOT NULL,
    num_added integer NOT NULL,
    num_replaced integer NOT NULL,
    num_removed integer NOT NULL
);
CREATE TABLE support_sets (
    id character varying(64) NOT NULL,
    name character varying(128),
    version integer NOT NULL,
    created_at double precision NOT NULL,
    updated_at double precision NOT NULL,
    expires_at double precision,
    is_pinned boolean NOT NULL,
    next_place integer NOT NULL,
    metadata json NOT NULL
);
ALTER TABLE ONLY examples ALTER COLUMN row_id SET DEFAULT nextval('examples_row_id_seq'::regclass);
ALTER TABLE ONLY schema_version ALTER COLUMN id SET DEFAULT nextval('schema_version_id_seq'::regclass);
INSERT INTO embeddings VALUES ('img_cd2a6f1c0cf1b641c4b5900829009d9160d6691d8e4b9c71786fcdf0cfc69ea5', 'c37fc1bd86199a9d74dba4bdc8eaa40b-float32-mean-upright-8-bits', '\x36d7debe9e189b3f479bac3f361f74bff3f78abcb294613f6f640a3fdd66623fb278a83d4e78663f164259bf25c598be5d785dbe2580ffbfd6d24ebe800b4dbfea39aa3fc65e33bfb2be30bf5d4a5bbf5a155bbf537ad53e11b10bbedaf64abe5eed7bbf633896bd9a59fcbe174aaf3f86e19ebeed88833f285d333f51d22d3e', 1795763076.8646622);
INSERT INTO embeddings VALUES ('img_c10285b43e7b494ff7f336a8eaf4ae4b84f010592b4bb595ea2983189b4ee8bc', 'c37fc1bd86199a9d74dba4bdc8eaa40b-float32-mean-upright-8-bits', '\xae6630bdced7203fc22fe73f4e913dbfd27186be72ef81bec64f9abe5a6d683fd3ef523e2000c13f85ecfebeda728cbe7e34f33e909891bf232f67bcb0e074bf0ece913f003d59bf559bd5be13488dbede2ab9bf702e55bfcd9a4abe9642613e3621b7be9a53803fd36288bf467a783fda830cbe5c0ba43f629d303fadd07ebf', 1795763076.8646622);
INSERT INTO embeddings VALUES ('img_3133d0be5fe3e93089e7ca5422472657263212d07d6b86926d0eaad35be83d60', 'c37fc1bd86199a9d74dba4bdc8eaa40b-float32-mean-upright-8-bits', '\xbb2b333e38b68fbf42b9d0be674422bfdb819ebeca5bdabfa8122cbf2e18d2bec563b1be688e6dbffe44a13f0bbd013fb54255bf62f3983fb231e83dc016a83fe56c1b3fa5559d3ef39be2bea1e7233f803fd2bdf6a1863f90c18e3e43b2e43e9d01e0bea6463b3f95711a3fd33d103f0bb378bf5d5bf9bd2cb0a83f03c1cebf', 1795763076.8646622);
INSERT INTO embeddings VALUES ('img_0600e34629c3b6ef61bb0977c45c07eb515044a26437883f567e2bc301a4f06c', 'c37fc1bd86199a9d74dba4bdc8eaa40b-float32-mean-upright-8-bits', '\x8103043f32e3a4bf799090bea627b8be5cd59abe5a8704c0b5be74bf96d3eebeaeaf1ebef0dfefbe5ee9993faeeae73e08b567bee36ecd3f83dc223e66106a3ff21c913e05c87f3e63a1c6bc46f0623f009151bebe819d3d28be5d3e3a99083f1d7d013e3b26973f80d7533e9a11f23dc7244bbf84ca18bee32b863f205efebf', 1795763076.8646622);
INSERT INTO embeddings VALUES ('img_e87c816323c516196957ab2a1f6fad7755c7e0372c8c8dca3d8534f7412920f9', 'c37fc1bd86199a9d74dba4bdc8eaa40b-float32-mean-upright-8-bits', '\xcb18a13eda709f3da019efbf525d8cbd7e1d343fdd63243f721b8a3f8da170bf8ec5983c60ccaebfe80410be3fdd843efef042bfe0ae753ee675c8be9a0fa63e462295bef3a73c3fd48c0b3fce884dbe1e88e13fe35bae3f36ab9d3e38872ebf5ac381bd4d0da0bf8d05843f6d241dbe78865bbf3f4db1bf6af35c3eded8653f', 1795763076.8646622);
INSERT INTO embeddings VALUES ('img_6bd3835fcff539d124a38231ea17d9f87389ab1892f3816fdab8eea595b49a97', 'c37fc1bd86199a9d74dba4bdc8eaa40b-float32-mean-upright-8-bits', '\x0a55fc3e02648fbf62e5bcbf7e033bbeb480063ed150a3bf46c24bbeea427abf761e4ebed0ecb2bf52d6833f50e40c3f43273bbf6353cc3fd85460bd837e963f388ad6bd61ab383fa0a0773ecd202b3f1b5e6c3f85f4803f48e4be3e9aea9b3d7e43963d16a7cd3de021683fca1c06be56587fbf0af17fbfb6e3573f7e6f6ebf', 1795763076.8646622);
INSERT INTO evaluation_cells VALUES ('eval_01a21bd1f3d7bbb20b5396a64513', 0, '{"strategy": "random", "k": 1, "seed": 0, "method": "in_context", "control": null, "status": "completed", "queries": 6, "correct": 2, "accuracy": 0.3333333333333333, "accuracy_interval": [0.09677141110578041, 0.700006684861608], "confusion": {"red": {"red": 2}, "green": {"red": 3}, "blue": {"red": 1}}, "expected_calibration_error": 0.5220996671549727, "bins": [{"low": 0.0, "high": 0.1, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.1, "high": 0.2, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.2, "high": 0.3, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.3, "high": 0.4, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.4, "high": 0.5, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.5, "high": 0.6, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.6, "high": 0.7, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.7, "high": 0.8, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.8, "high": 0.9, "count": 6, "confidence": 0.855433000488306, "accuracy": 0.3333333333333333}, {"low": 0.9, "high": 1.0, "count": 0, "confidence": null, "accuracy": null}], "brier": 1.1400540984362284, "nll": 2.5321317883608288, "is_correct": [true, true, false, false, false, false], "answers": ["red", "red", "red", "red", "red", "red"], "temperature": 3.363585661014859, "curve": [{"threshold": 0.8296268252190021, "coverage": 0.16666666666666666, "accuracy": 0.0, "confidence": 0.8296268252190022}, {"threshold": 0.8282812944426949, "coverage": 0.3333333333333333, "accuracy": 0.5, "confidence": 0.8289540598308487}, {"threshold": 0.8277604527822513, "coverage": 0.5, "accuracy": 0.6666666666666666, "confidence": 0.8285561908146496}, {"threshold": 0.8277559046214812, "coverage": 0.6666666666666666, "accuracy": 0.5, "confidence": 0.8283561192663575}, {"threshold": 0.8277317222957882, "coverage": 0.8333333333333334, "accuracy": 0.4, "confidence": 0.8282312398722438}, {"threshold": 0.0, "coverage": 1.0, "accuracy": 0.3333333333333333, "confidence": 0.8280815705025518}], "cost": {"prompt_tokens": 28.0, "cached_tokens": 10.666666666666666, "media": 2.0, "media_encoded": 0.0}, "latency": {"queries": 6, "median_seconds": 0.2726985089993832, "p90_seconds": 0.40203138000106264}, "error": null}');
INSERT INTO evaluation_cells VALUES ('eval_01a21bd1f3d7bbb20b5396a64513', 1, '{"strategy": "rices_image", "k": 1, "seed": 0, "method": "in_context", "control": null, "status": "completed", "queries": 6, "correct": 2, "accuracy": 0.3333333333333333, "accuracy_interval": [0.09677141110578041, 0.700006684861608], "confusion": {"red": {"red": 2}, "green": {"red": 3}, "blue": {"red": 1}}, "expected_calibration_error": 0.5221074947905571, "bins": [{"low": 0.0, "high": 0.1, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.1, "high": 0.2, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.2, "high": 0.3, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.3, "high": 0.4, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.4, "high": 0.5, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.5, "high": 0.6, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.6, "high": 0.7, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.7, "high": 0.8, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.8, "high": 0.9, "count": 6, "confidence": 0.8554408281238904, "accuracy": 0.3333333333333333}, {"low": 0.9, "high": 1.0, "count": 0, "confidence": null, "accuracy": null}], "brier": 1.1402331042355138, "nll": 2.532427342499778, "is_correct": [true, true, false, false, false, false], "answers": ["red", "red", "red", "red", "red", "red"], "temperature": 3.363585661014859, "curve": [{"threshold": 0.8297954632151362, "coverage": 0.16666666666666666, "accuracy": 0.0, "confidence": 0.8297954632151363}, {"threshold": 0.8280854626962962, "coverage": 0.3333333333333333, "accuracy": 0.5, "confidence": 0.8289404629557163}, {"threshold": 0.827946921560417, "coverage": 0.5, "accuracy": 0.3333333333333333, "confidence": 0.8286092824906165}, {"threshold": 0.8277317222957882, "coverage": 0.6666666666666666, "accuracy": 0.25, "confidence": 0.8283898924419095}, {"threshold": 0.8276350640191874, "coverage": 0.8333333333333334, "accuracy": 0.4, "confidence": 0.8282389267573651}, {"threshold": 0.0, "coverage": 1.0, "accuracy": 0.3333333333333333, "confidence": 0.8280915387389925}], "cost": {"prompt_tokens": 27.333333333333332, "cached_tokens": 9.333333333333334, "media": 2.0, "media_encoded": 0.0}, "latency": {"queries": 6, "median_seconds": 0.3796100599993224, "p90_seconds": 0.4192972325017763}, "error": null}');
INSERT INTO evaluation_cells VALUES ('eval_01a21bd1f3d7bbb20b5396a64513', 2, '{"strategy": "random", "k": 2, "seed": 0, "method": "in_context", "control": null, "status": "completed", "queries": 6, "correct": 2, "accuracy": 0.3333333333333333, "accuracy_interval": [0.09677141110578041, 0.700006684861608], "confusion": {"red": {"red": 2}, "green": {"red": 3}, "blue": {"red": 1}}, "expected_calibration_error": 0.5220499485602923, "bins": [{"low": 0.0, "high": 0.1, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.1, "high": 0.2, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.2, "high": 0.3, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.3, "high": 0.4, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.4, "high": 0.5, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.5, "high": 0.6, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.6, "high": 0.7, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.7, "high": 0.8, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.8, "high": 0.9, "count": 6, "confidence": 0.8553832818936257, "accuracy": 0.3333333333333333}, {"low": 0.9, "high": 1.0, "count": 0, "confidence": null, "accuracy": null}], "brier": 1.139976192814151, "nll": 2.530970124997744, "is_correct": [true, true, false, false, false, false], "answers": ["red", "red", "red", "red", "red", "red"], "temperature": 3.363585661014859, "curve": [{"threshold": 0.8296386424646669, "coverage": 0.16666666666666666, "accuracy": 0.0, "confidence": 0.829638642464667}, {"threshold": 0.8282958512018705, "coverage": 0.3333333333333333, "accuracy": 0.5, "confidence": 0.8289672468332688}, {"threshold": 0.8276802684858946, "coverage": 0.5, "accuracy": 0.3333333333333333, "confidence": 0.8285382540508107}, {"threshold": 0.8276665884748262, "coverage": 0.6666666666666666, "accuracy": 0.5, "confidence": 0.8283203376568147}, {"threshold": 0.8276484830420333, "coverage": 0.8333333333333334, "accuracy": 0.4, "confidence": 0.8281859667338584}, {"threshold": 0.0, "coverage": 1.0, "accuracy": 0.3333333333333333, "confidence": 0.828023220510704}], "cost": {"prompt_tokens": 44.0, "cached_tokens": 30.0, "media": 3.0, "media_encoded": 0.0}, "latency": {"queries": 6, "median_seconds": 0.011205822498595808, "p90_seconds": 0.28852744449977763}, "error": null}');
INSERT INTO evaluation_cells VALUES ('eval_01a21bd1f3d7bbb20b5396a64513', 3, '{"strategy": "rices_image", "k": 2, "seed": 0, "method": "in_context", "control": null, "status": "completed", "queries": 6, "correct": 2, "accuracy": 0.3333333333333333, "accuracy_interval": [0.09677141110578041, 0.700006684861608], "confusion": {"red": {"red": 2}, "green": {"red": 3}, "blue": {"red": 1}}, "expected_calibration_error": 0.5222171727138407, "bins": [{"low": 0.0, "high": 0.1, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.1, "high": 0.2, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.2, "high": 0.3, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.3, "high": 0.4, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.4, "high": 0.5, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.5, "high": 0.6, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.6, "high": 0.7, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.7, "high": 0.8, "count": 0, "confidence": null, "accuracy": null}, {"low": 0.8, "high": 0.9, "count": 6, "confidence": 0.855550506047174, "accuracy": 0.3333333333333333}, {"low": 0.9, "high": 1.0, "count": 0, "confidence": null, "accuracy": null}], "brier": 1.1401225826470565, "nll": 2.531471914916587, "is_correct": [true, true, false, false, false, false], "answers": ["red", "red", "red", "red", "red", "red"], "temperature": 3.363585661014859, "curve": [{"threshold": 0.8297987435879427, "coverage": 0.16666666666666666, "accuracy": 0.0, "confidence": 0.8297987435879428}, {"threshold": 0.8287639604146436, "coverage": 0.3333333333333333, "accuracy": 0.5, "confidence": 0.8292813520012933}, {"threshold": 0.8278329685700895, "coverage": 0.5, "accuracy": 0.3333333333333333, "confidence": 0.8287985575242254}, {"threshold": 0.8277805830894429, "coverage": 0.6666666666666666, "accuracy": 0.25, "confidence": 0.8285440639155298}, {"threshold": 0.827659325666562, "coverage": 0.8333333333333334, "accuracy": 0.4, "confidence": 0.8283671162657363}, {"threshold": 0.0, "coverage": 1.0, "accuracy": 0.3333333333333333, "confidence": 0.8281962467802849}], "cost": {"prompt_tokens": 44.166666666666664, "cached_tokens": 21.333333333333332, "media": 3.0, "media_encoded": 0.0}, "latency": {"queries": 6, "median_seconds": 0.011107950000223354, "p90_seconds": 0.014939127000616281}, "error": null}');
INSERT INTO evaluations VALUES ('eval_01a21bd1f3d7bbb20b5396a64513', 'ss_01a21bd1bc6a9cc2b20fb1c54cd2', 3, 'completed', '{"request": {"k": [1, 2]}, "settled": {"template": "classification", "order": null, "candidates": [{"label": "red", "text": "red", "param": "candidates[0]"}, {"label": "green", "text": "green", "param": "candidates[1]"}, {"label": "blue", "text": "blue", "param": "candidates[2]"}], "weighing": {"normalisation": "sum", "calibration": "none", "content_free": "grey", "permutations": 1, "seed": 0}, "cells": [{"strategy": "random", "k": 1, "seed": 0, "method": "in_context", "control": null}, {"strategy": "rices_image", "k": 1, "seed": 0, "method": "in_context", "control": null}, {"strategy": "random", "k": 2, "seed": 0, "method": "in_context", "control": null}, {"strategy": "rices_image", "k": 2, "seed": 0, "method": "in_context", "control": null}], "queries": ["e0", "e1", "e2", "e3", "e4", "e6"]}, "truths": ["red", "red", "green", "green", "blue", "green"], "num_examples": 6, "prior": "nearest_mean", "single": ["blue"]}', 24, 1795763074.0067933, 1795763074.0209963, 1795763079.8682518, 'null', '8fdc40f2885a407b93b216473081416c', 0);
INSERT INTO example_media VALUES (1, 0, 'img_cd2a6f1c0cf1b641c4b5900829009d9160d6691d8e4b9c71786fcdf0cfc69ea5');
INSERT INTO example_media VALUES (2, 0, 'img_a312ce06f8477129b34decd03786e9b9a637025413663ffc6f52dc685b059c90');
INSERT INTO example_media VALUES (3, 0, 'img_3133d0be5fe3e93089e7ca5422472657263212d07d6b86926d0eaad35be83d60');
INSERT INTO example_media VALUES (4, 0, 'img_0600e34629c3b6ef61bb0977c45c07eb515044a26437883f567e2bc301a4f06c');
INSERT INTO example_media VALUES (5, 0, 'img_e87c816323c516196957ab2a1f6fad7755c7e0372c8c8dca3d8534f7412920f9');
INSERT INTO example_media VALUES (6, 0, 'img_ee61c1e17a4b741b4b776363bba5e2a336ec74bddd953f97d6495478aef23cf2');
INSERT INTO example_media VALUES (7, 0, 'img_c10285b43e7b494ff7f336a8eaf4ae4b84f010592b4bb595ea2983189b4ee8bc');
INSERT INTO example_media VALUES (8, 0, 'img_6bd3835fcff539d124a38231ea17d9f87389ab1892f3816fdab8eea595b49a97');
INSERT INTO example_media VALUES (9, 0, 'img_d0516f5aa3ac5dd710f0c9eb0868b30269739e9916dc64e17138cb48bfe07c57');
INSERT INTO examples VALUES (1, 'ss_01a21bd1bc6a9cc2b20fb1c54cd2', 'e0', 0, 1, NULL, '', '', 'red', '{"n": 0}');
INSERT INTO examples VALUES (2, 'ss_01a21bd1bc6a9cc2b20fb1c54cd2', 'e1', 1, 1, 2, '', '', 'red', '{"n": 1}');
INSERT INTO examples VALUES (3, 'ss_01a21bd1bc6a9cc2b20fb1c54cd2', 'e2', 2, 1, NULL, '', '', 'green', '{"n": 2}');
INSERT INTO examples VALUES (4, 'ss_01a21bd1bc6a9cc2b20fb1c54cd2', 'e3', 3, 1, NULL, '', '', 'green', '{"n": 3}');
INSERT INTO examples VALUES (5, 'ss_01a21bd1bc6a9cc2b20fb1c54cd2', 'e4', 4, 1, NULL, '', '', 'blue', '{"n": 4}');
INSERT INTO examples VALUES (6, 'ss_01a21bd1bc6a9cc2b20fb1c54cd2', 'e5', 5, 1, 3, '', '', 'blue', '{"n": 5}');
INSERT INTO examples VALUES (7, 'ss_01a21bd1bc6a9cc2b20fb1c54cd2', 'e1', 1, 2, NULL, '', '', 'red', '{}');
INSERT INTO examples VALUES (8, 'ss_01a21bd1bc6a9cc2b20fb1c54cd2', 'e6', 7, 2, NULL, '', '', 'green', '{}');
INSERT INTO examples VALUES (9, 'ss_01a21bd1c1810866c15e13924be0', 'a', 0, 1, NULL, 'a text alone', '', '', '{}');
INSERT INTO first_answers VALUES ('', 'create-colours', '10a39b0af861977e8b39a72c91646bcca8d928e7795401765e909226d30a4c97', '{"id": "ss_01a21bd1bc6a9cc2b20fb1c54cd2", "name": "colours", "version": 1, "latest_version": 1, "created_at": 1795763060.9262254, "updated_at": 1795763060.9262254, "expires_at": null, "is_pinned": false, "metadata": {"owner": "tests"}, "num_examples": 6, "num_media": 6, "num_bytes": 456, "label_counts": {"red": 2, "green": 2, "blue": 2}, "example_ids": ["e0", "e1", "e2", "e3", "e4", "e5"]}', 1795763060.9262254);
INSERT INTO fits VALUES ('ss_01a21bd1bc6a9cc2b20fb1c54cd2', 3, 'linear', 'c37fc1bd86199a9d74dba4bdc8eaa40b-float32-mean-upright-8-bits', 1, '\x98000000000000007b22706172616d65746572732e62696173223a7b226474797065223a22463634222c227368617065223a5b335d2c22646174615f6f666673657473223a5b302c32345d7d2c22706172616d65746572732e77656967687473223a7b226474797065223a22463634222c227368617065223a5b332c33325d2c22646174615f6f666673657473223a5b32342c3739325d7d7d20202020202020da8c2c757fbfd73f47900c86acdcc8bf85884c6452a2c6bf6c70dfde413ccfbfea207941e73ae43fa80f124f2d22f23f1144b84bc62dcfbf7f6cd027093dc2bf62ad89609ddbd93f0a1b8f2bb22f573fd0f7ffb73f79e53f291c5c5839d1bb3ff5748115f41bee3fa40a97e76f8ce0bfb36173a0cfbfd1bfbf7e1698e685d43f33bec2334749f0bf4cd8faad84627d3f470d8f101b90e5bf2433e891f1a2df3f71dce4b5b455e1bf76245e485b7dd3bf9b2c35622c50d7bfc533cfb1b956eabfbb11f50feee4debf6dbc02f09b0cc8bfe6c15334628da53fa1235858196dcfbf7403a4e39317d03ffc0d75eb1c16e4bff678d4b80d95dd3fe2008eed953fd13f3871c162a8e4e93f90ade9bade9c4b3fb40d23720d5b983f2e15607316aec63ff98a39091b79f0bf5838da3455a6c6bfa1ff46a5699996bfafc88732ca84d5bf39d116e2d481f6bfe196f3d97d7beabfb36bfcd89c89d1bf0741b79c8eeccabf8c211db49779dbbf08c472f5b2cdef3f1977a39402b3d33f29003b41ccaec5bf285c0c0d8b07f43f22419fe85252cc3f4f374ff45ceeeb3f9179172ed6e795bf621c48e58dd2c93fa4c90d0a07b3c1bf4a1958309f21e63f3d5e7a458e65cebf49075ac69bf1ac3fc5b2b286a8bfbe3f3487596f6efede3f37c9aaabe0b4bd3f63e9f8da9b90e83f874d81a66210ca3f9efa82ff336ababf067003ce267eccbfdba3f6b8c2f9a6bf307b034e5efddc3fee5a5e1aea39f3bfb0b6fed6561cb13fffe9f3a19d6ed93f5091ed50c59aeebf019230c07900d13ff7fe6fc64ea3de3fde65f489ed0af03f56cfdd00e66fea3f08840397e268d9bfdf6512e1e307ba3f3de4723b285fe0bfbc72b71b8682debfb15501432f339fbf6ffdf1ee005dc3bf76ef4cca1ef2cdbfec170f0e673dcdbffea7008f0779c9bf95bb062f7444debfc3aa257922c2d53f540965cdde56dc3ff0057bfe11f3d4bfb3e596a10ef8f03fe6d02997ba46db3f35c652598f59b13fbcfff15a0dd8e0bf0dbf8202a992c03f8f7565e6324ef0bf4c75a9830824db3f57baf3b880fad6bf944762341404a8bf0a0732370c75e8bffdef60bd2c0bddbfb7ce95e47dd8f23f', 1795763082.305491);
INSERT INTO media VALUES ('img_0600e34629c3b6ef61bb0977c45c07eb515044a26437883f567e2bc301a4f06c', 76, false);
INSERT INTO media VALUES ('img_3133d0be5fe3e93089e7ca5422472657263212d07d6b86926d0eaad35be83d60', 76, false);
INSERT INTO media VALUES ('img_a312ce06f8477129b34decd03786e9b9a637025413663ffc6f52dc685b059c90', 75, false);
INSERT INTO media VALUES ('img_cd2a6f1c0cf1b641c4b5900829009d9160d6691d8e4b9c71786fcdf0cfc69ea5', 75, false);
INSERT INTO media VALUES ('img_e87c816323c516196957ab2a1f6fad7755c7e0372c8c8dca3d8534f7412920f9', 77, false);
INSERT INTO media VALUES ('img_ee61c1e17a4b741b4b776363bba5e2a336ec74bddd953f97d6495478aef23cf2', 77, false);
INSERT INTO media VALUES ('img_6bd3835fcff539d124a38231ea17d9f87389ab1892f3816fdab8eea595b49a97', 77, false);
INSERT INTO media VALUES ('img_c10285b43e7b494ff7f336a8eaf4ae4b84f010592b4bb595ea2983189b4ee8bc', 76, false);
INSERT INTO media VALUES ('img_fcee7bafe9a5a41f3f434cd63850dacaac9e767f00b30e87ad19f1ce7d987200', 78, true);
INSERT INTO media VALUES ('img_d0516f5aa3ac5dd710f0c9eb0868b30269739e9916dc64e17138cb48bfe07c57', 69, false);
INSERT INTO schema_version VALUES (1, 1);
INSERT INTO support_set_versions VALUES ('ss_01a21bd1bc6a9cc2b20fb1c54cd2', 1, 1795763060.9262254, 6, 6, 0, 0);
INSERT INTO support_set_versions VALUES ('ss_01a21bd1bc6a9cc2b20fb1c54cd2', 2, 1795763060.9951217, 7, 1, 1, 0);
INSERT INTO support_set_versions VALUES ('ss_01a21bd1bc6a9cc2b20fb1c54cd2', 3, 1795763061.030851, 6, 0, 0, 1);
INSERT INTO support_set_versions VALUES ('ss_01a21bd1c1810866c15e13924be0', 1, 1795763061.1363707, 1, 1, 0, 0);
INSERT INTO support_sets VALUES ('ss_01a21bd1bc6a9cc2b20fb1c54cd2', 'colours', 3, 1795763060.9262254, 1795763061.030851, NULL, false, 8, '{"owner": "tests"}');
INSERT INTO support_sets VALUES ('ss_01a21bd1c1810866c15e13924be0', NULL, 1, 1795763061.1363707, 1795763061.1363707, NULL, false, 1, '{}');
SELECT pg_catalog.setval('examples_row_id_seq', 9, true);
SELECT pg_catalog.setval('schema_version_id_seq', 1, false);
ALTER TABLE ONLY embeddings
    ADD CONSTRAINT embeddings_pkey PRIMARY KEY (key, model);
ALTER TABLE ONLY evaluation_cells
    ADD CONSTRAINT evaluation_cells_pkey PRIMARY KEY (evaluation_id, place);
ALTER TABLE ONLY evaluations
    ADD CONSTRAINT evaluations_pkey PRIMARY KEY (id);
ALTER TABLE ONLY example_media
    ADD CONSTRAINT example_media_pkey PRIMARY KEY (row_id, place);
ALTER TABLE ONLY examples
    ADD CONSTRAINT examples_pkey PRIMARY KEY (row_id);
ALTER TABLE ONLY first_answers
    ADD CONSTRAINT first_answers_pkey PRIMARY KEY (scope, key);
ALTER TABLE ONLY fits
    ADD CONSTRAINT fits_pkey PRIMARY KEY (set_id, version, method, model, format);
ALTER TABLE ONLY media_leases
    ADD CONSTRAINT media_leases_pkey PRIMARY KEY (holder, media_id);
ALTER TABLE ONLY media
    ADD CONSTRAINT media_pkey PRIMARY KEY (media_id);
ALTER TABLE ONLY schema_version
    ADD CONSTRAINT schema_version_pkey PRIMARY KEY (id);
ALTER TABLE ONLY support_set_versions
    ADD CONSTRAINT support_set_versions_pkey PRIMARY KEY (set_id, version);
ALTER TABLE ONLY support_sets
    ADD CONSTRAINT support_sets_name_key UNIQUE (name);
ALTER TABLE ONLY support_sets
    ADD CONSTRAINT support_sets_pkey PRIMARY KEY (id);
CREATE INDEX ix_embeddings_created_at ON embeddings USING btree (created_at);
CREATE INDEX ix_evaluations_status ON evaluations USING btree (status);
CREATE INDEX ix_evaluations_support_set ON evaluations USING btree (support_set);
CREATE INDEX ix_example_media_by_media ON example_media USING btree (media_id);
CREATE UNIQUE INDEX ix_examples_by_id ON examples USING btree (set_id, example_id, first_version);
CREATE INDEX ix_examples_by_place ON examples USING btree (set_id, place);
CREATE INDEX ix_first_answers_created_at ON first_answers USING btree (created_at);
CREATE INDEX ix_fits_created_at ON fits USING btree (created_at);
CREATE INDEX ix_media_leases_media_id ON media_leases USING btree (media_id);
CREATE INDEX ix_support_sets_expires_at ON support_sets USING btree (expires_at);
ALTER TABLE ONLY evaluation_cells
    ADD CONSTRAINT evaluation_cells_evaluation_id_fkey FOREIGN KEY (evaluation_id) REFERENCES evaluations(id) ON DELETE CASCADE;
ALTER TABLE ONLY example_media
    ADD CONSTRAINT example_media_media_id_fkey FOREIGN KEY (media_id) REFERENCES media(media_id);
ALTER TABLE ONLY example_media
    ADD CONSTRAINT example_media_row_id_fkey FOREIGN KEY (row_id) REFERENCES examples(row_id) ON DELETE CASCADE;
ALTER TABLE ONLY examples
    ADD CONSTRAINT examples_set_id_fkey FOREIGN KEY (set_id) REFERENCES support_sets(id) ON DELETE CASCADE;
ALTER TABLE ONLY fits
    ADD CONSTRAINT fits_set_id_version_fkey FOREIGN KEY (set_id, version) REFERENCES support_set_versions(set_id, version) ON DELETE CASCADE;
ALTER TABLE ONLY media_leases
    ADD CONSTRAINT media_leases_media_id_fkey FOREIGN KEY (media_id) REFERENCES media(media_id);
ALTER TABLE ONLY support_set_versions
    ADD CONSTRAINT support_set_versions_set_id_fkey FOREIGN KEY (set_id) REFERENCES support_sets(id) ON DELETE CASCADE;
